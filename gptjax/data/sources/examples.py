"""Examples to fine-tune on: prompts with their completions, and conversations, from the fields of records."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np

from gptjax.config import SourceConfig
from gptjax.data.sources.classes import ClassifiedTexts
from gptjax.data.sources.source import ASSISTANT, Document, Fields, Malformed, Record, Turn, decoded, truncated, value_of


def fields_of(config: SourceConfig) -> 'Fields | Examples | ClassifiedTexts':
  """What a source makes of its records: documents, examples or texts with a class. Raises a UserError for a template that is invalid."""
  if config.label:
    return ClassifiedTexts(config)
  return Examples(config) if config.has_examples else Fields(config.text)


class Examples:
  """Makes examples of records: documents with turns."""

  def __init__(self, config: SourceConfig):
    self._config = config
    self._fields = [Fields(getattr(config, name), f'data.source.{name}') for name in ('prompt', 'completion') if config.prompt]
    self.names = list(dict.fromkeys(name for fields in self._fields for name in fields.names)) or [config.messages]
    self.text = repr([config.prompt, config.completion, config.messages, config.chat, config.supervised])
    """everything that the examples of a record depend on"""

  def check(self, names: list[str], place: str) -> None:
    """Raises a UserError if a field does not exist; `names` are the full names of all columns of `place`."""
    for fields in self._fields or [Fields(self._config.messages, 'data.source.messages')]:
      fields.check(names, place)

  def record(self, name: str, record: Mapping[str, Any], index: int) -> Record:
    """The example in a record, whose answers must have text."""
    turns = self._messages(record, index) if self._config.messages else self._completion(record, index)
    if isinstance(turns, Malformed):
      return turns
    text = '\n'.join(turn.content for turn in turns)
    answers = [turn for turn in turns if turn.is_answer]
    if not answers or not all(turn.content.strip() for turn in answers):
      return Malformed(truncated(text), 'an example whose answers (completion, or turns of the assistant) have text', index)
    return Document(name, text, tuple(turns))

  def _completion(self, record: Mapping[str, Any], index: int) -> list[Turn] | Malformed:
    texts = [fields.value(record, index) for fields in self._fields]
    if malformed := next((text for text in texts if isinstance(text, Malformed)), None):
      return malformed
    prompt, completion = map(str, texts)
    roles = ('user', ASSISTANT) if self._config.chat else ('', '')
    return [Turn(roles[0], prompt, False, self._weight(False)), Turn(roles[1], completion, True, 1.0)]

  def _messages(self, record: Mapping[str, Any], index: int) -> list[Turn] | Malformed:
    field, expected = self._config.messages, 'a list of messages, each an object with role and content, which are texts'
    messages = value_of(record, field, index)
    if isinstance(messages, Malformed):
      return messages
    if not (messages := _objects(messages)):
      return Malformed(truncated(str(value_of(record, field, index))), f'{expected}, in the field {field}', index)
    turns = []
    for message in messages:
      try:
        role, content = (decoded(message.get(key)) for key in ('role', 'content'))
      except UnicodeError:
        role = content = None
      if not role or content is None:
        return Malformed(truncated(str(message)), expected, index)
      if others := [key for key, value in message.items() if key not in ('role', 'content', 'weight') and not _is_empty(value)]:
        return Malformed(others[0], 'messages with role, content and weight alone', index)
      is_answer, weight = role == ASSISTANT, message.get('weight')
      if weight is None:
        weight = self._weight(is_answer)
      elif isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) <= 1:
        return Malformed(truncated(str(weight)), 'a weight from 0 to 1', index)
      elif not is_answer and float(weight) != self._weight(False):
        return Malformed(truncated(str(weight)), f'no weight but {self._weight(False):g} for messages of other roles than assistant', index)
      turns.append(Turn(role, content, is_answer, float(weight)))
    return turns

  def _weight(self, is_answer: bool) -> float:
    return float(is_answer or self._config.supervised == 'all')


def _is_empty(value: Any) -> bool:
  return value is None or (hasattr(value, '__len__') and not len(value))


def _objects(messages: Any) -> list[Mapping[str, Any]]:
  """A list of objects, or an object of lists, as TFDS has them, as a list; empty for anything else."""
  if isinstance(messages, Mapping):
    lists = [list(values) if isinstance(values, list | tuple | np.ndarray) else [] for values in messages.values()]
    if not lists or len({*map(len, lists)}) > 1:
      return []
    return [dict(zip(messages, values, strict=True)) for values in zip(*lists, strict=True)]
  return list(messages) if isinstance(messages, list | tuple) and all(isinstance(one, Mapping) for one in messages) else []
