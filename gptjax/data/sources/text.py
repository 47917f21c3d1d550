"""Text files: each a document, or cut into documents at a separator; and what they share with JSON lines."""

import abc
from collections.abc import Iterable, Iterator, Sequence

from gptjax.config import SourceConfig
from gptjax.data.sources.borders import Border
from gptjax.data.sources.compressed import SUFFIXES, Stream
from gptjax.data.sources.fields import unescaped
from gptjax.data.sources.files import File, fingerprint, opened
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source

_AHEAD = 2**23


class RecordFiles(Source):
  """Files whose records end at borders. A part is a stretch of one: its records are those that begin there.

  A worker reads the bytes of its part by itself. A compressed file can be read only from its beginning, so who asks
  for the parts reads it, and its parts carry the bytes.
  """

  def __init__(self, files: Sequence[File], border: Border, step: int, description: str, skip: float):
    self.files = files
    self.border = border
    self.step = step
    self.description = description
    self.skip = skip
    self.size = sum(file.size for file in files)

  def parts(self) -> Iterator[Part]:
    for file in self.files:
      if file.path.endswith(SUFFIXES):
        yield from self._compressed(file)
      else:
        for start in range(0, file.size, self.step):
          stop = min(start + self.step, file.size)
          yield Part(file.path, file.name, start, stop, stop - start)

  def _compressed(self, file: File) -> Iterator[Part]:
    with opened(file.path, _AHEAD) as raw:
      stream = Stream(raw, file.path)
      begin = taken = 0
      while True:
        # The same cuts as those of the plain file.
        end = self.border.after(stream.read, stream.reach((begin // self.step + 1) * self.step), begin)
        if end == begin:
          break
        payload = stream.read(begin, end)
        stream.drop(end)
        before, taken = taken, raw.tell()
        yield Part(file.path, file.name, begin, end, taken - before, payload)
        begin = end

  def stretch(self, part: Part) -> tuple[int, bytes]:
    """The bytes of a part's records, and where they begin in the file."""
    if part.payload:
      return part.start, part.payload
    with opened(part.file) as file:
      def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)
      return self.border.stretch(read, part.start, part.stop)

  def read(self, part: Part) -> Iterator[Record]:
    for index, (offset, piece) in enumerate(self.pieces(*self.stretch(part))):
      yield self.record(part, index, offset, piece)

  def pieces(self, offset: int, data: bytes) -> Iterable[tuple[int, bytes]]:
    """The records of a stretch, each with its place in the file."""
    return self.border.split(data, offset)

  @abc.abstractmethod
  def record(self, part: Part, index: int, offset: int, piece: bytes) -> Record:
    """What the bytes of a record give; `index` counts in the part, `offset` is the record's place in the file."""


class TextFiles(RecordFiles):
  """UTF-8 files. Bytes become text one to one: line ends stay as they are in the file.

  With a separator a file is cut there, and pieces of white space only are left out. Without one it is a document, or,
  if it is large, several, each from a line end that no white space follows to another.
  """

  whole_bytes = 64 * 2**20
  """files above this size are cut without a separator, too"""

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig):
    separator = unescaped(config.separator)
    self._separator = separator
    super().__init__(files, Border(separator), self.part_bytes if separator else self.whole_bytes, description, config.skip)
    if separator:
      self.description += f', cut at {separator!r}'
    elif any(file.size > self.whole_bytes or file.path.endswith(SUFFIXES) for file in files):
      self.description += f', those above {self.whole_bytes / 2**20:.0f} MB cut at line ends'

  @property
  def names(self) -> Sequence[str]:  # type: ignore[override]
    if self._separator:
      return ()
    known = all(file.size <= self.whole_bytes and not file.path.endswith(SUFFIXES) for file in self.files)
    return [file.name for file in self.files] if known or len(self.files) == 1 else ()

  def fingerprint(self) -> str:
    return fingerprint('text', self.files, self._separator)

  def pieces(self, offset: int, data: bytes) -> Iterable[tuple[int, bytes]]:
    if self._separator:
      return super().pieces(offset, data)
    return [(offset, data)] if data else []

  def record(self, part: Part, index: int, offset: int, piece: bytes) -> Record:
    try:
      text = piece.decode()
    except UnicodeDecodeError as error:
      found = piece[error.start:error.start + 4]
      return Malformed(found, 'a file of UTF-8 text', index, f'{part.file}, byte {offset + error.start}')
    if self._separator:
      return Document(f'{part.name}#{offset}', text) if text.strip() else None
    return Document(f'{part.name}#{offset}' if offset else part.name, text)
