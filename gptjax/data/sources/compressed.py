"""Compressed files: read once, from the beginning, a window at a time."""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from gptjax.data.sources.packages import optional

SUFFIXES = ('.gz', '.zst')

_CHUNK = 2**16
"""Compressed bytes read together: few, since nothing bounds what they become."""


def stem(name: str) -> str:
  """A file's name without .gz or .zst."""
  return name.removesuffix('.gz').removesuffix('.zst')


class Stream:
  """The bytes that a compressed file holds, from a place that moves on.

  Args:
    raw: the compressed file.
    path: its name, which says how it is compressed.

  Raises:
    OSError: the file is broken or ends early, when that is read.
    UserError: the package that reads it is not installed.
  """

  def __init__(self, raw: BinaryIO, path: str):
    self._chunks = _decompressed(raw, path)
    self._data = bytearray()
    self._start = 0

  def reach(self, stop: int) -> int:
    """Reads on to a place; the place, or the end if that comes before."""
    while self._start + len(self._data) < stop:
      chunk = next(self._chunks, None)
      if chunk is None:
        break
      self._data += chunk
    return min(stop, self._start + len(self._data))

  def read(self, start: int, stop: int) -> bytes:
    """The bytes from start, which is not before what was dropped, to stop or the end."""
    self.reach(stop)
    return bytes(memoryview(self._data)[start - self._start:stop - self._start])

  def drop(self, stop: int) -> None:
    """Forgets the bytes up to a place."""
    del self._data[:stop - self._start]
    self._start = stop


def _decompressed(raw: BinaryIO, path: str) -> Iterator[bytes]:
  begin, broken = _codec(path)
  member = None  # both formats may hold several, one behind another
  while chunk := raw.read(_CHUNK):
    while chunk:
      member = member or begin()
      try:
        yield member.decompress(chunk)
      except broken as error:
        raise OSError(f'broken {path[path.rfind("."):]} data: {error}') from None
      chunk, member = (member.unused_data, None) if member.eof else (b'', member)
  if member:
    raise OSError('it ends early')


def _codec(path: str) -> tuple[Callable[[], Any], type[Exception]]:
  if path.endswith('.gz'):
    return lambda: zlib.decompressobj(wbits=31), zlib.error
  zstandard = optional('zstandard', path)
  # The limit is for files made with --long; by itself zstandard refuses windows above 128 MB.
  return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, zstandard.ZstdError
