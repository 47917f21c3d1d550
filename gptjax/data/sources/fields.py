"""The text of a record: one of its fields, or a template over them."""

import re
import string
from collections.abc import Mapping
from numbers import Number
from typing import Any

from gptjax.config import UserError
from gptjax.data.sources.source import Document, Malformed, Record

_FIELD = re.compile(r'[^.\[\]{}]+(\.[^.\[\]{}]+)*')


def unescaped(text: str) -> str:
  """Text of a flag, in which `\\n` and `\\t` may be written as two characters."""
  return text.replace('\\n', '\n').replace('\\t', '\t')


class Fields:
  """Extracts text from records: a field, or a template such as '{question}\\n{answer}', with '{{' and '}}' for braces.

  'a.b' is field b of the object in field a. Raises a UserError if the template is invalid.
  """

  def __init__(self, text: str):
    self.text = text
    self._template = '{' in text
    self._pieces = _parse(text) if self._template else [('', text)]
    self.names = list(dict.fromkeys(field for _, field in self._pieces if field))

  def check(self, names: list[str], place: str) -> None:
    """Raises a UserError if a field does not exist; `names` are the full names of all columns of `place`."""
    for field in self.names:
      # A column may be an object whose fields are not listed, or a field of an object that is.
      if not any(f'{name}.'.startswith(f'{field}.') or f'{field}.'.startswith(f'{name}.') for name in names):
        raise UserError('data.source.text', field, f'a column of {place}: {", ".join(names)}', names=names)

  def record(self, name: str, record: Mapping[str, Any], index: int) -> Record:
    """Makes a document of a record, number `index` of its part; None if its text is only white space.

    Fields are strings, UTF-8 bytes, mappings or, for templates, numbers.
    """
    text = ''
    for literal, field in self._pieces:
      value = self._value(record, field, index) if field else ''
      if isinstance(value, Malformed):
        return value
      text += literal + value
    return Document(name, text) if text.strip() else None

  def _value(self, record: Mapping[str, Any], field: str, index: int) -> str | Malformed:
    value, parent = record, ''
    for key in field.split('.'):
      if not isinstance(value, Mapping) or key not in value:
        names = tuple(f'{parent}{name}' for name in value) if isinstance(value, Mapping) else ()
        return Malformed(field, f'a field that the record has: {", ".join(names) or "none"}', index, names=names)
      value, parent = value[key], f'{parent}{key}.'
    expected = f'text{" or a number" * self._template} in the field {field}'
    try:
      if isinstance(value, bytes):
        return value.decode()
      if isinstance(value, str):
        value.encode()  # JSON can contain lone surrogates, which UTF-8 cannot represent
        return value
    except (UnicodeEncodeError, UnicodeDecodeError) as error:
      return Malformed(error.object[error.start:error.start + 4], f'UTF-8 {expected}', index)
    if self._template and isinstance(value, Number) and not isinstance(value, bool):
      return str(value)
    return Malformed(truncated(str(value)), expected, index)


def truncated(text: str) -> str:
  """At most 60 characters of a text, for error messages."""
  return text if len(text) <= 60 else f'{text[:59]}…'


def _parse(text: str) -> list[tuple[str, str]]:
  """Parses a template to pairs of literal text and the field after it."""
  expected = "a field's name, or a template of fields and text such as '{question}\\n{answer}'"
  try:
    pieces = list(string.Formatter().parse(unescaped(text)))
  except ValueError as error:
    raise UserError('data.source.text', text, f'{expected} ({error})') from None
  if any(field is not None and (spec or conversion or not _FIELD.fullmatch(field)) for _, field, spec, conversion in pieces):
    raise UserError('data.source.text', text, f'{expected}, with plain names in the braces')
  if not any(field for _, field, _, _ in pieces):
    raise UserError('data.source.text', text, f'{expected}, with at least one field')
  return [(literal, field or '') for literal, field, _, _ in pieces]
