"""What a workdir keeps of its data, so that a model can be scored and sampled where the data is not."""

import dataclasses
import json
import lzma
import shutil
import zlib
from pathlib import Path

from gptjax.config import UserError
from gptjax.data.prepare import Prepared
from gptjax.data.store import TokenStore
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.files import read_json


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
  """Tokenizer and validation documents of a run."""

  tokenizer: Tokenizer
  valid: TokenStore
  valid_text: Path


def export(prepared: Prepared, directory: Path) -> None:
  """Copies the tokenizer and the validation documents into a run's folder; it appears there whole or not at all.

  Raises:
    UserError: the folder holds those of other data.
  """
  identity = directory / 'identity.json'
  if identity.exists():
    was = read_json(identity)['fingerprint']
    if was != prepared.fingerprint:
      raise UserError('data', prepared.fingerprint, f'{was}, the fingerprint of the documents, split and tokenizer that '
                      f'{directory} was made from; another --workdir for other data')
    return
  partial = directory.with_suffix('.partial')
  shutil.rmtree(partial, ignore_errors=True)
  for name in ('tokenizer', 'valid'):
    shutil.copytree(prepared.directory / name, partial / name)
  shutil.copy(prepared.valid_text, partial / prepared.valid_text.name)
  (partial / identity.name).write_text(json.dumps({'fingerprint': prepared.fingerprint, 'valid_text': prepared.valid_text.name}))
  partial.rename(directory)


def open_held_out(directory: Path) -> HeldOut:
  """Opens what `export` wrote.

  Raises:
    UserError: nothing was exported there.
  """
  identity = directory / 'identity.json'
  if not identity.exists():
    raise UserError('--workdir', str(directory.parent), 'a folder that gptjax.train made')
  text = read_json(identity)['valid_text']
  return HeldOut(load_tokenizer(directory / 'tokenizer'), TokenStore.open(directory / 'valid'), directory / text)


def compression_yardsticks(data: HeldOut | Prepared) -> dict[str, float]:
  """Bits per byte that general compressors need for the concatenated validation documents.

  Returns:
    'gzip -9' and 'xz -9'; a trained model should need fewer.
  """
  compressors = {'gzip -9': zlib.compressobj(9, wbits=31), 'xz -9': lzma.LZMACompressor(preset=9)}
  return {name: 8 * _compressed(data.valid_text, compressor) / data.valid.bytes
          for name, compressor in compressors.items()}


def _compressed(path: Path, compressor) -> int:
  """Bytes of a file once compressed."""
  with path.open('rb') as file:
    blocks = iter(lambda: file.read(2**20), b'')
    return sum(len(compressor.compress(block)) for block in blocks) + len(compressor.flush())
