"""What a workdir keeps of its data, so that a model can be scored and sampled where the data is not."""

import dataclasses
import itertools
import json
import lzma
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.folders import open_folder
from gptjax.data.prepare import Prepared
from gptjax.data.store import TokenStore
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.files import read_json

_LARGEST_COMPRESSED = 2**26
"""Bytes of text that xz needs a minute for."""


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
  """Tokenizer and validation documents of a run."""

  tokenizer: Tokenizer
  valid: dict[str, TokenStore]
  """validation sets by name"""
  tags: dict[str, list[str]]
  """names of the sets that each tag has"""


def export(prepared: Prepared, directory: Path, replace: bool = False) -> None:
  """Copies the tokenizer and the validation sets into a run's folder; it appears there whole or not at all.

  Raises:
    UserError: the folder holds those of other data, or a validation set is damaged.
  """
  identity = directory / 'identity.json'
  if identity.exists():
    was = _identity(identity)['fingerprint']
    if was == prepared.fingerprint:
      return
    if not replace:
      raise UserError('data', prepared.fingerprint, f'{was}, the fingerprint of the documents, split and tokenizer that '
                      f'{directory} was made from; another --workdir for other data')
  partial = directory.with_suffix('.partial')
  shutil.rmtree(partial, ignore_errors=True)
  prepared.tokenizer.save(partial / 'tokenizer')
  try:
    for name, store in prepared.valid.items():
      store.verify()
      open_folder(store.place).copy(partial / 'valid' / name)
  except UserError:
    shutil.rmtree(partial)
    raise
  facts = {'fingerprint': prepared.fingerprint, 'valid': list(prepared.valid), 'tags': prepared.tags}
  (partial / identity.name).write_text(json.dumps(facts))
  if directory.exists():
    old = directory.with_suffix('.replaced')
    shutil.rmtree(old, ignore_errors=True)
    directory.rename(old)
    shutil.rmtree(old)
  partial.rename(directory)


def open_held_out(directory: Path) -> HeldOut:
  """Opens what `export` wrote.

  Raises:
    UserError: nothing was exported there.
  """
  if not (directory / 'identity.json').exists():
    raise UserError('--workdir', str(directory.parent), 'a folder that gptjax.train made')
  identity = _identity(directory / 'identity.json')
  sets = {name: TokenStore.open(directory / 'valid' / name) for name in identity['valid']}
  return HeldOut(load_tokenizer(directory / 'tokenizer'), sets, identity['tags'])


def _identity(file: Path) -> dict[str, Any]:
  """What `export` wrote last.

  Raises:
    UserError: something else is in the file.
  """
  found = read_json(file)
  texts = lambda values: isinstance(values, list) and all(isinstance(one, str) for one in values)
  match found:
    case {'fingerprint': str(), 'valid': valid, 'tags': dict(tags)} if texts(valid) and all(
        texts(names) and {*names} <= {*valid} for names in tags.values()):
      return found
  raise UserError(str(file), found, 'the fingerprint, validation sets and tags of a run, as they were written; restore it')


def compression_yardsticks(tokenizer: Tokenizer, stores: Mapping[str, TokenStore]) -> dict[str, float]:
  """Bits per byte that general compressors need for the documents of all stores, one after another.

  Returns:
    'gzip -9' and 'xz -9', where there are at most 64 MB; a trained model should need fewer.
  """
  total = sum(store.bytes for store in stores.values())
  if total > _LARGEST_COMPRESSED:
    return {}
  compressors: dict[str, Any] = {'gzip -9': zlib.compressobj(9, wbits=31), 'xz -9': lzma.LZMACompressor(preset=9)}
  sizes = dict.fromkeys(compressors, 0)
  for text in itertools.chain.from_iterable(_texts(tokenizer, store) for store in stores.values()):
    for name, compressor in compressors.items():
      sizes[name] += len(compressor.compress(text))
  return {name: 8 * (sizes[name] + len(compressor.flush())) / total for name, compressor in compressors.items()}


def _texts(tokenizer: Tokenizer, store: TokenStore) -> Iterator[bytes]:
  """The text of a store, some 100,000 ids at a time; separators have none."""
  for first in range(0, store.tokens, 100_000):
    ids: np.ndarray = store.read([first], [min(100_000, store.tokens - first)])
    yield b''.join(map(tokenizer.pieces.__getitem__, ids.tolist()))
