"""The interface of sources, and the text of records with fields."""

import abc
import collections
import dataclasses
import re
import string
import types
from collections.abc import Iterator, Mapping
from numbers import Number
from typing import Any, NamedTuple

from gptjax.config import UserError, unescaped


ASSISTANT = 'assistant'
"""The role whose messages are answers."""


class Turn(NamedTuple):
  """A part of an example: a prompt and its completion, which have no role, or a message."""

  role: str
  content: str
  is_answer: bool
  weight: float
  """of the loss of its tokens and, of an answer, of its end; 0 to 1"""


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and its name, which is unique in the source and does not depend on its location."""

  name: str
  text: str
  turns: tuple[Turn, ...] = ()
  """of an example"""
  label: int | None = None
  """number of the class of a text to classify"""
  others: tuple[tuple[Turn, ...], ...] = ()
  """further parts of an example: of a pair, the one with the rejected answer"""
  mismatched: bool = False
  """whether `with_mismatched` adds a part"""


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
  """location for errors, if more precise than the record's number: file and byte"""
  names: tuple[str, ...] = ()
  """valid values that this one may be a misspelling of"""


Record = Document | Malformed | None
"""Result of reading a record; None for one without text, such as a blank line."""


@dataclasses.dataclass(frozen=True)
class Part:
  """A unit of reading: a range of a source with some megabytes of text."""

  file: str
  """path, or another location for errors"""
  name: str
  """prefix of its documents' names"""
  start: int
  """first byte, row or record, depending on the source"""
  stop: int
  """end, exclusive"""
  size: int
  """bytes of the source, for progress reports"""
  payload: bytes = b''
  """the records, where the file can only be read sequentially (compressed text)"""


class Source(abc.ABC):
  """Documents in a fixed order, cut into parts that any process can read independently; cheap to pickle."""

  description: str
  """for manifests; does not depend on the location"""
  size: int
  """bytes of all parts"""
  skip: float
  """largest fraction of malformed records that may be skipped"""
  document_bytes: Mapping[str, int] = types.MappingProxyType({})
  """bytes of text of all documents by name, if known without reading; of a single one: the source is one document, possibly in pieces"""
  held_out: str = ''
  """description of what a split has held out"""
  has_examples: bool = False
  """whether its documents are examples"""
  labels: tuple[str, ...] = ()
  """names of the classes of its texts"""
  part_bytes: int = 8 * 2**20
  """approximate bytes of text per part"""
  numbering: str = ', record '
  """text between a file and the number of a record in errors"""

  @abc.abstractmethod
  def parts(self) -> Iterator[Part]:
    """Yields the parts lazily, in document order, the same at every call."""

  @abc.abstractmethod
  def read(self, part: Part) -> Iterator[Record]:
    """Yields one item per record of a part, in order. Raises a UserError if the file cannot be read."""

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Hex digest of all that is known without reading (names, sizes, modification times) and of the reading options."""

  def __iter__(self) -> Iterator[Document | Malformed]:
    for part in self.parts():
      yield from (record for record in self.read(part) if record is not None)


def documents(source: Source) -> Iterator[Document]:
  """Yields all documents. Raises a UserError that names the first malformed record if there are more than `source.skip` allows."""
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
  place = malformed.place or f'{part.file}{source.numbering}{before + malformed.record + 1}'
  return UserError(place, malformed.value, malformed.expected, names=malformed.names)


_FIELD = re.compile(r'[^.\[\]{}]+(\.[^.\[\]{}]+)*')


def unmarked(text: str) -> str:
  """The text without byte order marks, which mean nothing in UTF-8: editors start files with them, and concatenated files keep them."""
  return text.replace('\ufeff', '')


class Fields:
  """Extracts text from records: a field, or a template such as '{question}\\n{answer}', with '{{' and '}}' for braces.

  'a.b' is the field of that name or else field b of the object in field a. Raises a UserError if the template is invalid.
  """

  def __init__(self, text: str, place: str = 'data.source.text'):
    self.text, self._place = text, place
    self._template = '{' in text
    self._pieces = _parse(text, place) if self._template else [('', text)]
    self.names = list(dict.fromkeys(field for _, field in self._pieces if field))

  def check(self, names: list[str], place: str) -> None:
    """Raises a UserError if a field does not exist; `names` are the full names of all columns of `place`."""
    for field in self.names:
      # A column may be an object whose fields are not listed, or a field of an object that is.
      if not any(f'{name}.'.startswith(f'{field}.') or f'{field}.'.startswith(f'{name}.') for name in names):
        raise UserError(self._place, field, f'a column of {place}: {", ".join(names)}', names=names)

  def record(self, name: str, record: Mapping[str, Any], index: int) -> Record:
    """The document in a record of strings, UTF-8 bytes, mappings and, for templates, numbers; None if it is only white space."""
    text = self.value(record, index)
    return text if isinstance(text, Malformed) else Document(name, text) if text.strip() else None

  def value(self, record: Mapping[str, Any], index: int) -> str | Malformed:
    """The text of a record."""
    text = ''
    for literal, field in self._pieces:
      value = self._value(record, field, index) if field else ''
      if isinstance(value, Malformed):
        return value
      text += literal + value
    return text

  def _value(self, record: Mapping[str, Any], field: str, index: int) -> str | Malformed:
    value = value_of(record, field, index)
    if isinstance(value, Malformed):
      return value
    expected = f'text{" or a number" * self._template} in the field {field}'
    try:
      if (text := decoded(value)) is not None:
        return text
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
      return Malformed(error.object[error.start:error.start + 4], f'UTF-8 {expected}', index)
    if self._template and isinstance(value, Number) and not isinstance(value, bool):
      return str(value)
    return Malformed(truncated(str(value)), expected, index)


def decoded(value: Any) -> str | None:
  """A text without byte order marks; None for other values. Raises a UnicodeError for one that UTF-8 does not represent."""
  if isinstance(value, bytes):
    return unmarked(value.decode())
  if not isinstance(value, str):
    return None
  value.encode()  # JSON can contain lone surrogates
  return unmarked(value)


def value_of(record: Mapping[str, Any], field: str, index: int) -> Any:
  """The value of a field; Malformed if the record does not have it."""
  for value in _values(record, field):
    return value
  names = tuple(_full_names(record))
  return Malformed(field, f'a field that the record has: {", ".join(names) or "none"}', index, names=names)


def _values(record: Any, field: str) -> Iterator[Any]:
  """The values that a name such as 'a.b.c' may mean: that of field 'a.b.c', of c in the object 'a.b', and of 'b.c' or c of b in a."""
  if isinstance(record, Mapping):
    if field in record:
      yield record[field]
    for dot in reversed([at for at, char in enumerate(field) if char == '.']):
      yield from _values(record.get(field[:dot]), field[dot + 1:])


def _full_names(value: Any, prefix: str = '') -> Iterator[str]:
  """The names of all fields, as 'a.b' for field b of the object in field a; those with invisible characters are quoted."""
  if isinstance(value, Mapping) and value:
    for name, one in value.items():
      yield from _full_names(one, f'{prefix}{name}.')
  elif prefix:
    yield prefix[:-1] if prefix.isprintable() else repr(prefix[:-1])


def truncated(text: str) -> str:
  """At most 60 characters of a text."""
  return text if len(text) <= 60 else f'{text[:59]}…'


def _parse(text: str, place: str) -> list[tuple[str, str]]:
  """Parses a template to pairs of literal text and the field after it."""
  expected = "a field's name, or a template of fields and text such as '{question}\\n{answer}'"
  try:
    pieces = list(string.Formatter().parse(unescaped(text)))
  except ValueError as error:
    raise UserError(place, text, f'{expected} ({error})') from None
  if any(field is not None and (spec or conversion or not _FIELD.fullmatch(field)) for _, field, spec, conversion in pieces):
    raise UserError(place, text, f'{expected}, with plain names in the braces')
  if not any(field for _, field, _, _ in pieces):
    raise UserError(place, text, f'{expected}, with at least one field')
  return [(literal, field or '') for literal, field, _, _ in pieces]
