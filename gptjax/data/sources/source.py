"""What a source is: documents in a fixed order, cut into parts that any process can read by itself."""

import abc
import dataclasses
from collections.abc import Iterator, Sequence

from gptjax.config import UserError


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and the name that says where it came from, unique within its source and the same wherever the source lies."""

  name: str
  text: str


@dataclasses.dataclass(frozen=True)
class Malformed:
  """A record that should hold a document and does not."""

  value: str | bytes
  """what was found, shortened"""
  expected: str
  """what should have been there"""
  record: int
  """its index among the records of its part"""
  place: str = ''
  """what errors call its place, where that is more than its number: a file and the byte"""
  names: tuple[str, ...] = ()
  """what the value may be a misspelling of"""


Record = Document | Malformed | None
"""What a record gives; None: nothing, as a blank line does."""


@dataclasses.dataclass(frozen=True)
class Part:
  """A stretch of a source that is read at once: some megabytes of text."""

  file: str
  """what errors call the place, such as a path"""
  name: str
  """what the names of its documents begin with"""
  start: int
  """where the part begins: bytes, rows or records, as its source counts"""
  stop: int
  """where it ends"""
  size: int
  """bytes of the source that it takes up, for progress"""
  payload: bytes = b''
  """the records themselves, where only one process can read the file (compressed text)"""


class Source(abc.ABC):
  """Documents in a fixed order.

  A source is cheap to pickle: worker processes get a copy and read the parts that they are given.
  """

  description: str
  """what it is, for headers and manifests; the same wherever it lies"""
  size: int
  """bytes of all parts"""
  skip: float
  """largest share of malformed records that may be left out"""
  names: Sequence[str] = ()
  """names of all documents, where they are known without reading; one name: the source is one document, in whatever pieces"""
  part_bytes: int = 8 * 2**20
  """about how many bytes of text a part has"""

  @abc.abstractmethod
  def parts(self) -> Iterator[Part]:
    """The parts, in the order of the documents, the same at every call; made as they are asked for."""

  @abc.abstractmethod
  def read(self, part: Part) -> Iterator[Record]:
    """What the records of a part give: one item for each, in their order, so that who counts the items counts records.

    Raises:
      UserError: the file cannot be read.
    """

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Hex digest of what is known of the source without reading it (names, sizes, times of change) and how it is read."""

  def place(self, part: Part, record: int) -> str:
    """What an error calls a record: its file and line, where `record` counts from the first of the part's file."""
    return f'{part.file}, record {record + 1}'

  def __iter__(self) -> Iterator[Document | Malformed]:
    for part in self.parts():
      yield from (record for record in self.read(part) if record is not None)


def documents(source: Source) -> Iterator[Document]:
  """All documents of a source.

  Raises:
    UserError: a larger share of the records than its `skip` is malformed; the first of them is named.
  """
  first, records, malformed = None, 0, 0
  before: dict[str, int] = {}
  for part in source.parts():
    for record in source.read(part):
      records += 1
      before[part.file] = before.get(part.file, 0) + 1
      if isinstance(record, Malformed):
        malformed += 1
        first = first or refuse(source, part, dataclasses.replace(record, record=0), before[part.file] - 1)
        if not source.skip:
          raise first
      elif record is not None:
        yield record
  if first and malformed > source.skip * records:
    raise first


def refuse(source: Source, part: Part, malformed: Malformed, before: int) -> UserError:
  """The error for a malformed record of a part; `before` is how many records the earlier parts of its file have."""
  place = malformed.place or source.place(part, before + malformed.record)
  return UserError(place, malformed.value, malformed.expected, names=malformed.names)
