"""Where the records of a file end: found from any place in it as they are found from its beginning."""

import re
from collections.abc import Callable, Iterator

_WINDOW = 2**16
_LARGEST_WINDOW = 2**22
"""Bytes that are looked at together."""

_SPACES = b'|'.join(re.escape(char.encode()) for char in map(chr, range(0x3001)) if char.isspace())
_LINE_END = rb'\n(?!' + _SPACES + rb')(?=.)'
_LONGEST_SPACE = 3  # bytes

Read = Callable[[int, int], bytes]
"""Gives the bytes from a start to a stop, or those that there are."""


class Border:
  """What stands between two records: a text, or, where that is empty, a line end with no white space behind it."""

  def __init__(self, separator: str):
    self._separator = separator.encode(errors='surrogateescape') or b'\n'
    self._pattern = re.compile(re.escape(self._separator) if separator else _LINE_END, re.DOTALL)
    self._ahead = 0 if separator else _LONGEST_SPACE

  def after(self, read: Read, at: int, first: int = 0) -> int:
    """Where the first record begins that does not begin before `at`; the end of the bytes where none does.

    Args:
      read: gives bytes.
      at: a place in them.
      first: where some record is known to begin; nothing before it is read.
    """
    if at <= first:
      return first
    place, window = self._clear(read, at, first), max(_WINDOW, 2 * (len(self._separator) + self._ahead))
    while True:
      data = read(place, place + window)
      at_end = len(data) < window
      done = 0
      for match in self._pattern.finditer(data):
        if not at_end and match.end() + self._ahead > len(data):
          break  # what follows decides whether this is one
        done = match.end()
        if place + done >= at:
          return place + done
      if at_end:
        return place + len(data)
      place += max(done, len(data) - len(self._separator) - self._ahead + 1)
      window = max(window, min(2 * window, _LARGEST_WINDOW))

  def _clear(self, read: Read, at: int, first: int) -> int:
    """A place that nothing like the separator straddles, so that from there on the same ones are found as from `first`.

    It matters where a separator can overlap itself: of three line ends the first two are '\\n\\n', not the last two.
    """
    length = len(self._separator)
    place = max(first, at - length)
    while place > first:
      low = max(first, place - length + 1)
      straddling = read(low, place + length - 1).find(self._separator)
      if straddling < 0:
        break
      place = low + straddling
    return place

  def stretch(self, read: Read, start: int, stop: int) -> tuple[int, bytes]:
    """The records that begin from `start` to `stop`, with the borders behind them, and where the first begins."""
    begin = self.after(read, start)
    return begin, read(begin, self.after(read, stop))

  def split(self, data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """The records of such a stretch without their separators, each with its place; `offset` is the stretch's."""
    begin = 0
    while begin < len(data):
      end = data.find(self._separator, begin)
      end = len(data) if end < 0 else end
      yield offset + begin, data[begin:end]
      begin = end + len(self._separator)
