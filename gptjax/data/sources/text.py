"""Text files and JSON lines, cut into parts at the boundaries of records."""

import abc
import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence

from gptjax.config import SourceConfig, unescaped
from gptjax.data.sources.examples import fields_of
from gptjax.data.sources.files import File, FileSource, Stream, opened, packing
from gptjax.data.sources.source import Document, Malformed, Part, Record, truncated, unmarked

_READAHEAD = 2**23
_WINDOW, _MAX_WINDOW = 2**16, 2**22  # bytes searched for a boundary at once
_SPACES = b'|'.join(re.escape(char.encode()) for char in map(chr, range(0x3001)) if char.isspace())
_LINE_END = rb'\n(?!' + _SPACES + rb')(?=.)'
_LONGEST_SPACE = 3  # bytes
_OTHER_UNICODE = (('UTF-32', (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)), ('UTF-16', (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)))
_SNIFFED = 8000  # bytes at the start of a file; if one of them is 0, Git too calls it binary


class Boundary:
  """The starts of records, at a separator or, if it is empty, at line ends that no white space follows; the same from any offset."""

  def __init__(self, separator: str):
    self._splits = bool(separator)
    self._separator = separator.encode(errors='surrogateescape') or b'\n'
    self._pattern = re.compile(re.escape(self._separator) if separator else _LINE_END, re.DOTALL)
    self._lookahead = 0 if separator else _LONGEST_SPACE

  def after(self, read: Callable[[int, int], bytes], at: int, first: int = 0) -> int:
    """Offset of the first record that starts at `at` or later, or the end of the file.

    `read` returns the bytes from a start to a stop or the end of the file. A record starts at `first`; nothing before it is read.
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

  def _safe_start(self, read: Callable[[int, int], bytes], at: int, first: int) -> int:
    """An offset that no separator spans, from which matches are those from `first`: in three line ends, '\\n\\n' is the first two."""
    length = len(self._separator)
    offset = max(first, at - length)
    while offset > first:
      low = max(first, offset - length + 1)
      spanning = read(low, offset + length - 1).find(self._separator)
      if spanning < 0:
        break
      offset = low + spanning
    return offset

  def split(self, data: bytes, offset: int) -> Iterator[tuple[int, bytes]]:
    """Splits the data at `offset` of a file at separators; yields (offset in the file, record)."""
    begin = 0
    while begin < len(data):
      end = data.find(self._separator, begin) if self._splits else -1
      end = len(data) if end < 0 else end
      yield offset + begin, data[begin:end]
      begin = end + len(self._separator)


class RecordFiles(FileSource):
  """Files cut into parts of about `step` bytes; a part has the records that start in it and, of a compressed file, their bytes."""

  boundary: Boundary
  step: int

  def parts(self) -> Iterator[Part]:
    for file in self.files:
      if packing(file.path):
        yield from self._compressed(file)
      else:
        for start in range(0, file.size, self.step):
          stop = min(start + self.step, file.size)
          yield Part(file.path, file.name, start, stop, stop - start)

  def _compressed(self, file: File) -> Iterator[Part]:
    with opened(file.path, _READAHEAD) as raw:
      stream = Stream(raw, file.path)
      begin = read = 0
      # The cuts are those of the uncompressed file.
      while (end := self.boundary.after(stream.read, stream.reach((begin // self.step + 1) * self.step), begin)) > begin:
        payload = stream.read(begin, end)
        stream.drop(end)
        before, read = read, raw.tell()
        yield Part(file.path, file.name, begin, end, read - before, payload)
        begin = end

  def read(self, part: Part) -> Iterator[Record]:
    data, begin = part.payload, part.start
    if not data:
      with opened(part.file) as file:
        def read(start: int, stop: int) -> bytes:
          file.seek(start)
          return file.read(stop - start)
        begin = self.boundary.after(read, begin)
        data = read(begin, self.boundary.after(read, part.stop))
    if not part.start and (found := _other_content(data[:_SNIFFED])):
      yield Malformed(data[:8], f'UTF-8 text; this is {found}', 0, part.file)
      return
    for index, (offset, record) in enumerate(self.boundary.split(data, begin)):
      try:
        yield self.record(part, index, offset, unmarked(record.decode()))
      except UnicodeDecodeError as error:
        place = '' if self.numbering == ':' else f'{part.file}, byte {offset + error.start}'
        yield Malformed(record[error.start:error.start + 4], 'UTF-8 text', index, place)

  @abc.abstractmethod
  def record(self, part: Part, index: int, offset: int, text: str) -> Record:
    """Parses a record; `index` is its number in the part, `offset` its position in the file."""


def _other_content(data: bytes) -> str:
  """Describes a file that is not text in UTF-8 by its first bytes; '' if nothing shows that."""
  encoding = next((name for name, marks in _OTHER_UNICODE if data.startswith(marks)), '')
  if encoding:
    return f'{encoding}: convert it, for example with iconv'
  return 'a binary file' if b'\0' in data or data.startswith(b'%PDF-') else ''


class TextFiles(RecordFiles):
  """UTF-8 files, with unchanged line ends, split at a separator without the pieces of only white space.

  Without a separator, a file is a document; a large one is several, cut at line ends that no white space follows.
  """

  max_document_bytes = 64 * 2**20
  """larger files are cut even without a separator"""

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig):
    self._separator = separator = unescaped(config.separator)
    super().__init__(files, description, config, 'text', separator)
    self.boundary, self.step = Boundary(separator), self.part_bytes if separator else self.max_document_bytes
    may_cut = any(file.size > self.max_document_bytes or packing(file.path) for file in files)
    if separator:
      self.description += f', split at {separator!r}'
    elif may_cut:
      self.description += f', files above {self.max_document_bytes / 2**20:.0f} MB cut at line ends'
    if not separator and (not may_cut or len(files) == 1):
      self.document_bytes = {file.name: file.size for file in files}

  def record(self, part: Part, index: int, offset: int, text: str) -> Record:
    if self._separator:
      return Document(f'{part.name}#{offset}', text) if text.strip() else None
    return Document(f'{part.name}#{offset}' if offset else part.name, text) if text else None


_DECODER = json.JSONDecoder(parse_constant=int)  # JSON has no NaN: int('NaN') is a ValueError


class JsonLines(RecordFiles):
  """Files with one JSON object per line. A record is a line; blank lines contain no document."""

  numbering = ':'

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig):
    self._fields = fields_of(config)
    super().__init__(files, description, config, 'jsonl', self._fields.text)
    self.boundary, self.step = Boundary('\n'), self.part_bytes

  def record(self, part: Part, index: int, offset: int, text: str) -> Record:
    if not text.strip():
      return None
    try:
      value = _DECODER.decode(text)
    except (ValueError, RecursionError):
      value = None
    if not isinstance(value, dict):
      return Malformed(truncated(text), 'a JSON object on a line of its own', index)
    return self._fields.record(f'{part.name}#{offset}', value, index)


class JsonLists(FileSource):
  """Files with one JSON list of objects each, which are read at once."""

  numbering = ', object '

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig):
    self._fields = fields_of(config)
    super().__init__(files, description, config, 'json', self._fields.text)

  def parts(self) -> Iterator[Part]:
    for file in self.files:
      yield Part(file.path, file.name, 0, file.size, file.size)

  def read(self, part: Part) -> Iterator[Record]:
    with opened(part.file) as file:
      data = file.read()
    try:
      values = _DECODER.decode(unmarked(data.decode()).strip())
    except (ValueError, RecursionError) as error:
      values = str(error)
    if not isinstance(values, list):
      yield Malformed(data[:60], f'a list of JSON objects, as in the first file ({truncated(str(values))})', 0, part.file)
      return
    for index, value in enumerate(values):
      yield self._fields.record(f'{part.name}#{index}', value, index) if isinstance(value, dict) else (
        Malformed(truncated(str(value)), 'a JSON object', index))
