"""The interface of sources: documents in a fixed order, cut into parts that any process can read independently."""

import abc
import collections
import dataclasses
from collections.abc import Iterator, Sequence

from gptjax.config import UserError


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and its name, which is unique within the source and does not depend on the source's location."""

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Malformed:
  """A record that should contain a document but does not."""

  value: str | bytes
  """the offending value, truncated"""
  expected: str
  """description of a valid value"""
  record: int
  """index of the record within its part"""
  place: str = ''
  """location for error messages where it is more precise than the record's number: file and byte"""
  names: tuple[str, ...] = ()
  """valid values that this one may be a misspelling of"""


Record = Document | Malformed | None
"""What reading a record yields; None for one without text, such as a blank line."""


@dataclasses.dataclass(frozen=True)
class Part:
  """A unit of reading: a range of a source with some megabytes of text."""

  file: str
  """path, or another location for error messages"""
  name: str
  """prefix of its documents' names"""
  start: int
  """first byte, row or record, depending on the source"""
  stop: int
  """end, exclusive"""
  size: int
  """bytes of the source that it accounts for in progress reports"""
  payload: bytes = b''
  """the records themselves, where the file can only be read sequentially (compressed text)"""


class Source(abc.ABC):
  """Documents in a fixed order. Sources are cheap to pickle: each worker process gets a copy and reads the parts it is given."""

  description: str
  """for logs and manifests; does not depend on the location"""
  size: int
  """bytes of all parts"""
  skip: float
  """largest fraction of malformed records that may be skipped"""
  names: Sequence[str] = ()
  """names of all documents, where they are known without reading; a single name: the source is one document, possibly in pieces"""
  part_bytes: int = 8 * 2**20
  """approximate bytes of text per part"""

  @abc.abstractmethod
  def parts(self) -> Iterator[Part]:
    """Yields the parts lazily, in document order, the same at every call."""

  @abc.abstractmethod
  def read(self, part: Part) -> Iterator[Record]:
    """Yields exactly one item per record of a part, in order. Raises a UserError if the file cannot be read."""

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Hex digest of everything known without reading (names, sizes, modification times) and of the reading options."""

  def place(self, part: Part, record: int) -> str:
    """Location of a record for error messages; `record` is its index within the file."""
    return f'{part.file}, record {record + 1}'

  def __iter__(self) -> Iterator[Document | Malformed]:
    for part in self.parts():
      yield from (record for record in self.read(part) if record is not None)


def documents(source: Source) -> Iterator[Document]:
  """Yields all documents of a source.

  Raises a UserError if a larger fraction of the records than `source.skip` is malformed; the error names the first.
  """
  first, malformed = None, 0
  records: collections.Counter[str] = collections.Counter()
  for part in source.parts():
    before = records[part.file]
    for record in source.read(part):
      records[part.file] += 1
      if isinstance(record, Document):
        yield record
      elif record:
        malformed += 1
        first = first or malformed_error(source, part, record, before)
        if not source.skip:
          raise first
  if first and malformed > source.skip * records.total():
    raise first


def malformed_error(source: Source, part: Part, malformed: Malformed, before: int) -> UserError:
  """The error for a malformed record of a part; `before` is the number of records in earlier parts of the same file."""
  place = malformed.place or source.place(part, before + malformed.record)
  return UserError(place, malformed.value, malformed.expected, names=malformed.names)
