"""Folders as Hugging Face has them: config.json, the tensors in one file or in shards with an index, and a tokenizer's files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.files import read_json, sync, write_json
from gptjax.interop.tensor_files import Entry, create, fill, read_header

CONFIG, GENERATION = 'config.json', 'generation_config.json'
WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'

_VOCABULARY = ('tokenizer.json', 'vocab*', 'encoder.json', '*.model', '*.tiktoken')
"""Patterns of files of which every tokenizer has one."""

_TOKENIZER = (*_VOCABULARY, 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'chat_template*')

_KEPT = (CONFIG, GENERATION, 'README.md', 'LICENSE*', 'USE_POLICY*')
_PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl')


def read_object(path: Path) -> dict[str, Any]:
  """A JSON file that holds an object.

  Raises:
    UserError: it does not, or is not there.
  """
  values = read_json(path)
  if not isinstance(values, dict):
    raise UserError(str(path), values, 'an object of fields')
  return values


def read_tensors(folder: Path) -> dict[str, Entry]:
  """Where each tensor of a folder lies.

  Raises:
    UserError: no safetensors in the folder, or they are damaged or not all there.
  """
  if (folder / WEIGHTS).exists():
    return read_header(folder / WEIGHTS)
  if not (folder / INDEX).exists():
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    raise UserError(str(folder), pickles[0] if pickles else None, f'a folder with {WEIGHTS} or {INDEX}; only safetensors are read'
                    + (', never pickles, which can run code' if pickles else ''))
  places = read_object(folder / INDEX).get('weight_map')
  if not isinstance(places, dict) or not all(isinstance(file, str) and Path(file).name == file for file in places.values()):
    raise UserError(f'{folder / INDEX}: weight_map', type(places).__name__, 'the name of a file in this folder for each tensor')
  entries: dict[str, Entry] = {}
  for file in dict.fromkeys(places.values()):
    if not (folder / file).is_file():
      raise UserError(str(folder / file), None, f'a shard of the model, which {INDEX} names; there is none')
    found = read_header(folder / file)
    for name in sorted({name for name, place in places.items() if place == file} ^ found.keys()):
      expected = f'a tensor that {INDEX} says is in here' if name in found else f'the tensor {name}, which {INDEX} says is in here'
      raise UserError(str(folder / file), name if name in found else None, expected)
    entries |= found
  return entries


class Writer:
  """Writes a model's tensors in any order, in shards, with memory for one at a time.

  Args:
    folder: to write to.
    tensors: types and shapes by name.
    shard_bytes: most bytes of tensors in a file; a tensor that is larger has a file of its own.
  """

  def __init__(self, folder: Path, tensors: Mapping[str, Entry], shard_bytes: int):
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in tensors.items():
      if shards[-1] and sum(one.bytes for one in shards[-1].values()) + entry.bytes > shard_bytes:
        shards.append({})
      shards[-1][name] = entry
    count = len(shards)
    self._files = [folder / (WEIGHTS if count == 1 else f'model-{number:05d}-of-{count:05d}.safetensors') for number in range(1, count + 1)]
    self._left: dict[str, Entry] = {}
    for file, shard in zip(self._files, shards):
      self._left |= create(file, shard)
    if count > 1:
      index = {'metadata': {'total_size': sum(entry.bytes for entry in tensors.values())},
               'weight_map': {name: entry.file.name for name, entry in sorted(self._left.items())}}
      write_json(folder / INDEX, index)

  def write(self, name: str, value: np.ndarray) -> None:
    """Writes a tensor, once."""
    fill(self._left.pop(name), value)

  def finish(self) -> None:
    """Returns when all is on disk."""
    assert not self._left, f'never written: {", ".join(self._left)}'
    for file in self._files:
      sync(file)


def copy_words(source: Path, target: Path, tokenizer: bool = True) -> None:
  """Copies what a folder has beside its tensors: config, model card and licence, and the tokenizer's files where they are wanted."""
  for path in _matching(source, (*_KEPT, *_TOKENIZER) if tokenizer else _KEPT):
    (target / path.name).write_bytes(path.read_bytes())


def has_tokenizer(folder: Path) -> bool:
  """Whether there are files of a tokenizer."""
  return bool(_matching(folder, _VOCABULARY))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
  return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
