"""Record boundaries of a file, found by reading from any offset exactly as by reading from the start."""

import re
from collections.abc import Callable, Iterator

_WINDOW = 2**16
_MAX_WINDOW = 2**22
"""Bytes searched at once."""

_SPACES = b'|'.join(re.escape(char.encode()) for char in map(chr, range(0x3001)) if char.isspace())
_LINE_END = rb'\n(?!' + _SPACES + rb')(?=.)'
_LONGEST_SPACE = 3  # bytes

Read = Callable[[int, int], bytes]
"""Reads the bytes from a start to a stop, or up to the end of the file."""


class Boundary:
  """Separator of records: a string or, where it is empty, a line end that no white space follows."""

  def __init__(self, separator: str):
    self._separator = separator.encode(errors='surrogateescape') or b'\n'
    self._pattern = re.compile(re.escape(self._separator) if separator else _LINE_END, re.DOTALL)
    self._lookahead = 0 if separator else _LONGEST_SPACE

  def after(self, read: Read, at: int, first: int = 0) -> int:
    """Offset of the first record that starts at `at` or later; the end of the file if there is none.

    A record is known to start at `first`; nothing before it is read.
    """
    if at <= first:
      return first
    offset, window = self._safe_start(read, at, first), max(_WINDOW, 2 * (len(self._separator) + self._lookahead))
    while True:
      data = read(offset, offset + window)
      at_end = len(data) < window
      done = 0
      for match in self._pattern.finditer(data):
        if not at_end and match.end() + self._lookahead > len(data):
          break  # whether it is a boundary depends on bytes that are not in the window
        done = match.end()
        if offset + done >= at:
          return offset + done
      if at_end:
        return offset + len(data)
      offset += max(done, len(data) - len(self._separator) - self._lookahead + 1)
      window = max(window, min(2 * window, _MAX_WINDOW))

  def _safe_start(self, read: Read, at: int, first: int) -> int:
    """An offset that no occurrence of the separator spans, so that matching from there finds the same boundaries as from `first`.

    It matters where a separator can overlap itself: in three line ends '\\n\\n' is the first two, not the last two.
    """
    length = len(self._separator)
    offset = max(first, at - length)
    while offset > first:
      low = max(first, offset - length + 1)
      spanning = read(low, offset + length - 1).find(self._separator)
      if spanning < 0:
        break
      offset = low + spanning
    return offset

  def records(self, read: Read, start: int, stop: int) -> tuple[int, bytes]:
    """Offset and bytes of the records that start in [start, stop), separators included."""
    begin = self.after(read, start)
    return begin, read(begin, self.after(read, stop))

  def split(self, data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Yields (offset in the file, record without separator) from the result of `records`."""
    begin = 0
    while begin < len(data):
      end = data.find(self._separator, begin)
      end = len(data) if end < 0 else end
      yield offset + begin, data[begin:end]
      begin = end + len(self._separator)
