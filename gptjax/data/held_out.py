"""The copies of tokenizer and validation sets in a workdir, with which a model is scored and sampled where its data is not."""

import gzip
import json
import lzma
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.data.folders import open_folder
from gptjax.data.prepare import HeldOut, Prepared
from gptjax.data.store import TokenStore
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.files import atomic_directory, read_json

_MAX_COMPRESSED = 2**26  # bytes of text, which xz compresses in a minute


def export(prepared: Prepared, directory: Path, replace: bool = False) -> None:
  """Copies the tokenizer and the validation sets to a folder, which appears when it is complete.

  Raises a UserError if the folder has those of other data and `replace` is not set, or a validation set is damaged.
  """
  if (directory / 'identity.json').exists():
    found = _identity(directory)['fingerprint']
    if found == prepared.fingerprint:
      return
    if not replace:
      raise UserError('data', prepared.fingerprint, f'{found}, the fingerprint of the documents, split and tokenizer that '
                      f'{directory} was made from; another --workdir for other data')
  new, old = (directory.with_suffix(suffix) for suffix in ('.new', '.replaced'))
  for left_by_a_killed_process in (new, old):
    shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
  with atomic_directory(new, resumes=False) as folder:
    assert folder
    prepared.tokenizer.save(folder / 'tokenizer')
    for name, store in prepared.valid.items():
      store.verify()
      open_folder(store.location).copy(folder / 'valid' / name)
    facts = {'fingerprint': prepared.fingerprint, 'valid': list(prepared.valid), 'tags': prepared.tags}
    (folder / 'identity.json').write_text(json.dumps(facts))
  if directory.exists():
    directory.rename(old)
    shutil.rmtree(old)
  new.rename(directory)


def open_held_out(directory: Path) -> HeldOut:
  """Opens what `export` wrote. Raises a UserError if there is nothing, or it is damaged."""
  if not (directory / 'identity.json').exists():
    raise UserError('--workdir', str(directory.parent), 'a folder that gptjax.train made')
  identity = _identity(directory)
  sets = {name: TokenStore.open(directory / 'valid' / name) for name in identity['valid']}
  return HeldOut(load_tokenizer(directory / 'tokenizer'), sets, identity['tags'])


def _identity(directory: Path) -> dict[str, Any]:
  """Reads and validates identity.json."""
  found = read_json(directory / 'identity.json')
  strings = lambda values: isinstance(values, list) and all(isinstance(one, str) for one in values)
  match found:
    case {'fingerprint': str(), 'valid': valid, 'tags': dict(tags)} if strings(valid) and all(
        strings(names) and {*names} <= {*valid} for names in tags.values()):
      return found
  raise UserError(str(directory / 'identity.json'), found,
                  'the fingerprint, validation sets and tags of a run, as they were written; restore it')


def compression_yardsticks(tokenizer: Tokenizer, stores: Mapping[str, TokenStore]) -> dict[str, float]:
  """Bits per byte of 'gzip -9' and 'xz -9' on the documents of all stores, to compare with a model's; nothing above 64 MB."""
  total = sum(store.bytes for store in stores.values())
  if total > _MAX_COMPRESSED:
    return {}
  text_of = lambda ids: b''.join(map(tokenizer.pieces.__getitem__, ids.tolist()))
  data = b''.join(text_of(store.read([first], [min(100_000, store.tokens - first)]))
                  for store in stores.values() for first in range(0, store.tokens, 100_000))
  return {'gzip -9': 8 * len(gzip.compress(data, 9)) / total, 'xz -9': 8 * len(lzma.compress(data, preset=9)) / total}
