"""Texts to classify, from the fields of records."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from gptjax.config import SourceConfig
from gptjax.data.sources.source import Document, Fields, Malformed, Record, decoded, truncated, value_of


class ClassifiedTexts:
  """Makes documents with a class of records. A number stands for the name at its place in data.source.labels, from 0, unless one of the
  names is a number itself."""

  def __init__(self, config: SourceConfig):
    self._text, self._label, self._labels = Fields(config.text), config.label, config.labels
    self.names = list(dict.fromkeys([*self._text.names, config.label]))
    self.text = repr([config.text, config.label, config.labels])
    """everything that the documents of a record depend on"""
    self._numbers = {name: number for number, name in enumerate(config.labels)}
    if not any(name.isdecimal() for name in config.labels):
      self._numbers |= {str(number): number for number in range(len(config.labels))}

  def check(self, names: list[str], place: str) -> None:
    """Raises a UserError if a field does not exist; `names` are the full names of all columns of `place`."""
    self._text.check(names, place)
    Fields(self._label, 'data.source.label').check(names, place)

  def record(self, name: str, record: Mapping[str, Any], index: int) -> Record:
    """The text in a record, which must have a class and more than white space."""
    text, label = self._text.value(record, index), value_of(record, self._label, index)
    if malformed := next((one for one in (text, label) if isinstance(one, Malformed)), None):
      return malformed
    is_number = isinstance(label, Integral) and not isinstance(label, bool)
    try:
      written = str(label) if is_number else decoded(label)
    except UnicodeError:
      written = None
    if written not in self._numbers:
      return Malformed(truncated(str(label) if written is None else written), f'a label in the field {self._label}: '
                       f'{", ".join(self._labels)}', index, names=self._labels)
    return Document(name, str(text), label=self._numbers[written]) if str(text).strip() else Malformed('', 'a text to classify', index)
