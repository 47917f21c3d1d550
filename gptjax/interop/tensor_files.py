"""safetensors files, read and written one tensor at a time. Unlike pickles, they cannot contain code.

The safetensors package checks that a file is complete and consistent. Its writer would need all tensors of a file in memory, and its
reader would keep all that it has read there; so tensors are mapped and written here.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gptjax.config import UserError
from gptjax.files import read_json, sync, write_json

WEIGHTS, INDEX = 'model.safetensors', 'model.safetensors.index.json'
_PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl')

DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'F8_E5M2': ml_dtypes.float8_e5m2,
  'F8_E4M3': ml_dtypes.float8_e4m3fn, 'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U64': np.uint64,
  'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_}.items()}
"""NumPy's dtype for each of the format's names."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor of a file."""

  dtype: str
  """a key of DTYPES"""
  shape: tuple[int, ...]
  file: Path = Path()
  start: int = 0
  """offset of its first byte in the file"""

  @property
  def bytes(self) -> int:
    """Size in bytes."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize

  def view(self) -> np.ndarray:
    """The tensor, mapped from the file: only the parts that are accessed are read, and their memory is freed with the array."""
    if not self.bytes:
      return np.zeros(self.shape, DTYPES[self.dtype])
    return np.memmap(self.file, DTYPES[self.dtype], 'r', self.start, self.shape)


def read_header(path: Path) -> dict[str, Entry]:
  """The tensors of a file, by name. Raises a UserError for an incomplete or damaged file, or a dtype that is not in DTYPES."""
  try:
    with safe_open(path, 'numpy'), path.open('rb') as file:
      length = int.from_bytes(file.read(8), 'little')
      header = json.loads(file.read(length))
  except SafetensorError as error:
    raise UserError(str(path), str(error), 'a complete safetensors file') from None
  header.pop('__metadata__', None)
  for name, value in header.items():
    if value['dtype'] not in DTYPES:
      raise UserError(f'{path}: {name}', value['dtype'], ', '.join(DTYPES))
  return {name: Entry(value['dtype'], tuple(value['shape']), path, 8 + length + value['data_offsets'][0]) for name, value in header.items()}


def read_tensors(folder: Path) -> dict[str, Entry]:
  """The tensors of a folder, by name. Raises a UserError for a folder whose safetensors are missing, damaged or incomplete."""
  if (folder / WEIGHTS).exists():
    return read_header(folder / WEIGHTS)
  if not (folder / INDEX).exists():
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    raise UserError(str(folder), pickles[0] if pickles else None, f'a folder with {WEIGHTS} or {INDEX}; only safetensors are read'
                    + (', never pickles, which can run code' if pickles else ''))
  weight_map = read_json(folder / INDEX).get('weight_map')
  if not isinstance(weight_map, dict) or not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
    raise UserError(f'{folder / INDEX}: weight_map', type(weight_map).__name__, 'the name of a file in this folder for each tensor')
  entries: dict[str, Entry] = {}
  for file in dict.fromkeys(weight_map.values()):
    if not (folder / file).is_file():
      raise UserError(str(folder / file), None, f'the shard that {INDEX} lists')
    found = read_header(folder / file)
    for name in sorted({name for name, shard in weight_map.items() if shard == file} ^ found.keys()):
      expected = f'only tensors that {INDEX} lists' if name in found else f'the tensor {name}, which {INDEX} lists'
      raise UserError(str(folder / file), name if name in found else None, expected)
    entries |= found
  return entries


class Writer:
  """Writes a model's tensors in any order, into one file or several shards with an index, with one tensor in memory at a time.

  A file has at most `shard_bytes` bytes of tensors; a larger tensor gets its own file.
  """

  def __init__(self, folder: Path, tensors: Mapping[str, Entry], shard_bytes: int):
    shards: list[dict[str, Entry]] = [{}]
    for name, entry in tensors.items():
      if shards[-1] and sum(one.bytes for one in shards[-1].values()) + entry.bytes > shard_bytes:
        shards.append({})
      shards[-1][name] = entry
    count = len(shards)
    self._files = [folder / (WEIGHTS if count == 1 else f'model-{number:05d}-of-{count:05d}.safetensors') for number in range(1, count + 1)]
    self._entries: dict[str, Entry] = {}
    for file, shard in zip(self._files, shards):
      self._entries |= _create(file, shard)
    if count > 1:
      index = {'metadata': {'total_size': sum(entry.bytes for entry in tensors.values())},
               'weight_map': {name: entry.file.name for name, entry in sorted(self._entries.items())}}
      write_json(folder / INDEX, index)

  def write(self, name: str, value: np.ndarray) -> None:
    """Writes a tensor, once."""
    entry = self._entries.pop(name)
    assert value.shape == entry.shape and value.dtype == DTYPES[entry.dtype], f'{value.dtype}{list(value.shape)} for {entry}'
    with entry.file.open('r+b') as file:
      file.seek(entry.start)
      file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

  def finish(self) -> None:
    """Flushes the files to disk; every tensor must have been written."""
    assert not self._entries, f'never written: {", ".join(self._entries)}'
    for path in self._files:
      sync(path)


def _create(path: Path, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
  """Creates a file with a header and space for the tensors' data; returns the tensors with their file and offsets."""
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  # Wider types first, so that each tensor is aligned to its item size.
  for name, entry in sorted(tensors.items(), key=lambda item: (-DTYPES[item[1].dtype].itemsize, item[0])):
    start, end = end, end + entry.bytes
    header[name] = {'dtype': entry.dtype, 'shape': list(entry.shape), 'data_offsets': [start, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    file.truncate(8 + len(text) + end)
  return {name: dataclasses.replace(entry, file=path, start=8 + len(text) + header[name]['data_offsets'][0])
          for name, entry in tensors.items()}
