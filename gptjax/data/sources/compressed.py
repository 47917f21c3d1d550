"""Compressed files, read sequentially through a sliding window.

Not through fsspec or zstandard's stream_reader: those end silently where a .zst file was cut off.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from gptjax.data.packages import optional

SUFFIXES = ('.gz', '.zst')

_CHUNK = 2**16
"""Compressed bytes per read: few, since their decompressed size has no bound."""


def stem(name: str) -> str:
  """A file's name without .gz or .zst."""
  return name.removesuffix('.gz').removesuffix('.zst')


class Stream:
  """A sliding window over the decompressed bytes of a file.

  Args:
    raw: the compressed file.
    path: its name; the suffix decides the format.

  Raises:
    OSError: on reading, the file is broken or truncated.
    UserError: the package that reads it is not installed.
  """

  def __init__(self, raw: BinaryIO, path: str):
    self._chunks = _decompressed(raw, path)
    self._data = bytearray()
    self._start = 0

  def reach(self, stop: int) -> int:
    """Decompresses up to offset `stop`; returns it, or the end of the file if that comes first."""
    while self._start + len(self._data) < stop and (chunk := next(self._chunks, None)) is not None:
      self._data += chunk
    return min(stop, self._start + len(self._data))

  def read(self, start: int, stop: int) -> bytes:
    """Bytes from `start`, which must not have been dropped, to `stop` or the end of the file."""
    self.reach(stop)
    return bytes(memoryview(self._data)[start - self._start:stop - self._start])

  def drop(self, stop: int) -> None:
    """Discards the bytes before `stop`."""
    del self._data[:stop - self._start]
    self._start = stop


def _decompressed(raw: BinaryIO, path: str) -> Iterator[bytes]:
  new_decoder, decoding_error = _codec(path)
  decoder = None  # one per member: a file of either format may be several, concatenated
  while chunk := raw.read(_CHUNK):
    while chunk:
      decoder = decoder or new_decoder()
      try:
        yield decoder.decompress(chunk)
      except decoding_error as error:
        raise OSError(f'broken {path[path.rfind("."):]} data: {error}') from None
      chunk, decoder = (decoder.unused_data, None) if decoder.eof else (b'', decoder)
  if decoder:
    raise OSError('it ends early')


def _codec(path: str) -> tuple[Callable[[], Any], type[Exception]]:
  if path.endswith('.gz'):
    return lambda: zlib.decompressobj(wbits=31), zlib.error
  zstandard = optional('zstandard', 'data.source.path', path)
  # For files made with --long: by default zstandard refuses windows above 128 MB.
  return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, zstandard.ZstdError
