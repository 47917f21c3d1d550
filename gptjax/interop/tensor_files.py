"""The safetensors format: the length of a header (8 bytes), the header (JSON: type, shape and place of each tensor), the tensors' bytes.

Nothing in such a file is code, as there may be in a pickle. A reader here is as strict as the format's own: the tensors fill the
file without holes or overlaps. Little-endian, row-major.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.config import UserError

DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'F8_E5M2': ml_dtypes.float8_e5m2,
  'F8_E4M3': ml_dtypes.float8_e4m3fn, 'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U64': np.uint64,
  'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_}.items()}
"""The format's names of types."""

_LARGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor of a file."""

  dtype: str
  """one of DTYPES"""
  shape: tuple[int, ...]
  file: Path = Path()
  start: int = 0
  """its first byte in the file"""

  @property
  def bytes(self) -> int:
    """Size."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize

  def view(self) -> np.ndarray:
    """The tensor as it lies in the file: what is not touched is not read, and memory is given back with the array."""
    if not self.bytes:
      return np.zeros(self.shape, DTYPES[self.dtype])
    return np.memmap(self.file, DTYPES[self.dtype], 'r', self.start, self.shape)


def read_header(path: Path) -> dict[str, Entry]:
  """The tensors of a file, by name.

  Raises:
    UserError: the file is not whole, or not of this format.
  """
  def damaged(reason: str) -> UserError:
    return UserError(str(path), reason, 'a whole safetensors file')

  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if size < 8 or not 0 < length <= min(_LARGEST_HEADER, size - 8):
      raise damaged(f'{size:,} bytes, and a header of {length:,}')
    text = file.read(length)
  try:
    header = json.loads(text, object_pairs_hook=_once)
    entries = {name: _entry(value, path, 8 + length) for name, value in header.items() if name != '__metadata__'}
    ends = [8 + length + value['data_offsets'][1] for name, value in header.items() if name != '__metadata__']
  except KeyError as error:
    raise damaged(f'a header with {error.args[0]}, a type or field that is not known or not there') from None
  except (ValueError, TypeError, AttributeError, IndexError) as error:
    raise damaged(f'a header that does not read ({error})') from None
  place = 8 + length
  for (name, entry), end in sorted(zip(entries.items(), ends), key=lambda pair: (pair[0][1].start, pair[1])):
    if entry.start != place or end - entry.start != entry.bytes:
      raise damaged(f'{name} from byte {entry.start:,} to {end:,}, where {entry.bytes:,} bytes from {place:,} on are due')
    place = end
  if place != size:
    raise damaged(f'{size:,} bytes, and tensors up to {place:,}')
  return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  twice = [name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1]
  if twice:
    raise ValueError(f'{twice[0]} twice')
  return dict(pairs)


def _entry(value: dict[str, Any], path: Path, first: int) -> Entry:
  shape, (start, _) = tuple(value['shape']), value['data_offsets']
  if not all(isinstance(number, int) and number >= 0 for number in (*shape, *value['data_offsets'])):
    raise ValueError(f'shape {shape}, data_offsets {value["data_offsets"]}')
  if value['dtype'] not in DTYPES:
    raise KeyError(value['dtype'])
  return Entry(value['dtype'], shape, path, first + start)


def create(path: Path, tensors: Mapping[str, Entry]) -> dict[str, Entry]:
  """Makes a file with room for tensors, whose bytes are still to come; returns where each lies.

  Args:
    path: of the file.
    tensors: types and shapes by name.
  """
  # Wider types first, so that each tensor begins at a multiple of its item's size.
  names = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  place = 0
  for name in names:
    end = place + tensors[name].bytes
    header[name] = {'dtype': tensors[name].dtype, 'shape': list(tensors[name].shape), 'data_offsets': [place, end]}
    place = end
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    file.truncate(8 + len(text) + place)
  return {name: dataclasses.replace(tensors[name], file=path, start=8 + len(text) + header[name]['data_offsets'][0]) for name in names}


def fill(entry: Entry, value: np.ndarray) -> None:
  """Writes a tensor into its place in a file that `create` made."""
  assert value.shape == entry.shape and value.dtype == DTYPES[entry.dtype], f'{value.dtype}{list(value.shape)} for {entry}'
  with entry.file.open('r+b') as file:
    file.seek(entry.start)
    file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
