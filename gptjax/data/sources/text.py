"""Text files and JSON lines."""

import abc
import json
from collections.abc import Iterable, Iterator, Sequence

from gptjax.config import SourceConfig
from gptjax.data.sources.boundaries import Boundary
from gptjax.data.sources.fields import Fields, truncated, unescaped
from gptjax.data.sources.files import SUFFIXES, File, Stream, fingerprint, opened
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source

_READAHEAD = 2**23


class RecordFiles(Source):
  """Files cut into parts of about `step` bytes at record boundaries.

  A part covers a range of offsets; its records are those that start there, and a worker reads them independently. A compressed
  file can only be read sequentially: `parts` decompresses it, and each part carries its bytes.
  """

  def __init__(self, files: Sequence[File], boundary: Boundary, step: int, description: str, skip: float):
    self.files, self.boundary, self.step = files, boundary, step
    self.description, self.skip = description, skip
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
    with opened(file.path, _READAHEAD) as raw:
      stream = Stream(raw, file.path)
      begin = read = 0
      while True:
        # The cuts are those of the uncompressed file.
        end = self.boundary.after(stream.read, stream.reach((begin // self.step + 1) * self.step), begin)
        if end == begin:
          break
        payload = stream.read(begin, end)
        stream.drop(end)
        before, read = read, raw.tell()
        yield Part(file.path, file.name, begin, end, read - before, payload)
        begin = end

  def _records(self, part: Part) -> tuple[int, bytes]:
    """Offset and bytes of a part's records."""
    if part.payload:
      return part.start, part.payload
    with opened(part.file) as file:
      def read(start: int, stop: int) -> bytes:
        file.seek(start)
        return file.read(stop - start)
      return self.boundary.records(read, part.start, part.stop)

  def read(self, part: Part) -> Iterator[Record]:
    for index, (offset, data) in enumerate(self.split(*self._records(part))):
      yield self.record(part, index, offset, data)

  def split(self, offset: int, data: bytes) -> Iterable[tuple[int, bytes]]:
    """Splits bytes into records, each with its offset in the file."""
    return self.boundary.split(data, offset)

  @abc.abstractmethod
  def record(self, part: Part, index: int, offset: int, data: bytes) -> Record:
    """Parses a record; `index` is its number in the part, `offset` its position in the file."""


class TextFiles(RecordFiles):
  """UTF-8 files, decoded without changing line ends.

  With a separator a file is split there, and pieces of only white space are dropped. Without one, a file is a document; a large
  one is several, cut at line ends that no white space follows.
  """

  max_document_bytes = 64 * 2**20
  """larger files are cut even without a separator"""

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig):
    self._separator = separator = unescaped(config.separator)
    step = self.part_bytes if separator else self.max_document_bytes
    super().__init__(files, Boundary(separator), step, description, config.skip)
    self._may_cut = any(file.size > self.max_document_bytes or file.path.endswith(SUFFIXES) for file in files)
    if separator:
      self.description += f', split at {separator!r}'
    elif self._may_cut:
      self.description += f', files above {self.max_document_bytes / 2**20:.0f} MB cut at line ends'

  @property
  def names(self) -> Sequence[str]:  # type: ignore[override]
    known = not self._separator and (not self._may_cut or len(self.files) == 1)
    return [file.name for file in self.files] if known else ()

  def fingerprint(self) -> str:
    return fingerprint('text', self.files, self._separator)

  def split(self, offset: int, data: bytes) -> Iterable[tuple[int, bytes]]:
    if self._separator:
      return super().split(offset, data)
    return [(offset, data)] if data else []

  def record(self, part: Part, index: int, offset: int, data: bytes) -> Record:
    try:
      text = data.decode()
    except UnicodeDecodeError as error:
      found = data[error.start:error.start + 4]
      return Malformed(found, 'a file of UTF-8 text', index, f'{part.file}, byte {offset + error.start}')
    if self._separator:
      return Document(f'{part.name}#{offset}', text) if text.strip() else None
    return Document(f'{part.name}#{offset}' if offset else part.name, text)


def _reject_constant(name: str) -> None:
  raise ValueError(f'JSON has no {name}')


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


class JsonLines(RecordFiles):
  """Files with one JSON object per line. A record is a line; blank lines contain no document."""

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig):
    self._fields = Fields(config.text)
    super().__init__(files, Boundary('\n'), self.part_bytes, description, config.skip)

  def fingerprint(self) -> str:
    return fingerprint('jsonl', self.files, self._fields.text)

  def place(self, part: Part, record: int) -> str:
    return f'{part.file}:{record + 1}'

  def record(self, part: Part, index: int, offset: int, data: bytes) -> Record:
    try:
      line = data.decode()
      if not line.strip():
        return None
      value = _DECODER.decode(line)
    except UnicodeDecodeError as error:
      return Malformed(data[error.start:error.start + 4], 'UTF-8 text', index)
    except (ValueError, RecursionError):
      value = None
    if not isinstance(value, dict):
      return Malformed(truncated(line), 'a JSON object on a line of its own', index)
    return self._fields.record(f'{part.name}#{offset}', value, index)
