"""Examples to fine-tune on: prompts with their completions, and conversations, from the fields of records."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
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
    self._answers = ('chosen', 'rejected') if config.chosen else ('completion',)
    self._fields = [Fields(getattr(config, name), f'data.source.{name}') for name in ('prompt', *self._answers) if config.prompt]
    conversations = {} if config.prompt else {name: getattr(config, name) for name in ('messages', 'chosen', 'rejected')}
    self._conversations = {name: value for name, value in conversations.items() if value}
    self.names = list(dict.fromkeys([*(name for fields in self._fields for name in fields.names), *self._conversations.values()]))
    self.text = repr([config.prompt, config.completion, config.messages, config.chosen, config.rejected, config.mismatched, config.chat,
                      config.supervised])
    """everything that the examples of a record depend on"""

  def check(self, names: list[str], place: str) -> None:
    """Raises a UserError if a field does not exist; `names` are the full names of all columns of `place`."""
    for fields in self._fields or [Fields(value, f'data.source.{name}') for name, value in self._conversations.items()]:
      fields.check(names, place)

  def record(self, name: str, record: Mapping[str, Any], index: int) -> Record:
    """The example in a record, whose answers must have text."""
    found = ([self._messages(field, record, index) for field in self._conversations.values()] if self._conversations else
             self._completions(record, index))
    parts = [part for part in found if not isinstance(part, Malformed)]
    if malformed := next((part for part in found if isinstance(part, Malformed)), None):
      return malformed
    text = '\n'.join(turn.content for part in parts for turn in part)
    for part in parts:
      answers = [turn for turn in part if turn.is_answer]
      if not answers or not all(turn.content.strip() for turn in answers):
        return Malformed(truncated(text), 'an example whose answers (completion, or turns of the assistant) have text', index)
    return self._pair(name, text, parts, index) if len(parts) > 1 else Document(name, text, tuple(parts[0]))

  def _completions(self, record: Mapping[str, Any], index: int) -> list[list[Turn] | Malformed]:
    """The prompt with each of its answers."""
    prompt, *answers = [fields.value(record, index) for fields in self._fields]
    roles = ('user', ASSISTANT) if self._config.chat else ('', '')

    def part(answer: str | Malformed) -> list[Turn] | Malformed:
      if isinstance(prompt, Malformed):
        return prompt
      if isinstance(answer, Malformed):
        return answer
      return [Turn(roles[0], prompt, False, self._weight(False)), Turn(roles[1], answer, True, 1.0)]
    return list(map(part, answers))

  def _pair(self, name: str, text: str, parts: list[list[Turn]], index: int) -> Record:
    """Two answers to the same turns, of which the rest are targets."""
    chosen, rejected = parts
    common = next((at for at, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(map(len, parts)))
    expected = 'two answers, which differ, to the same messages'
    if not common or any([turn.role for turn in part[common:]] != [part[-1].role] or not part[-1].is_answer for part in parts):
      return Malformed(truncated(text), expected, index)
    only = [(*(turn._replace(weight=0.0) for turn in part[:common]), part[-1]) for part in parts]
    return Document(name, text, only[0], others=(only[1],), mismatched=self._config.mismatched)

  def _messages(self, field: str, record: Mapping[str, Any], index: int) -> list[Turn] | Malformed:
    expected = 'a list of messages, each an object with role and content, which are texts'
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


def with_mismatched(records: Iterable[Record]) -> Iterator[Record]:
  """Records in which each pair that asks for it has a third part: its prompt with the chosen answer of the pair before, of the first pair
  with that of the last; of a single pair with its own rejected answer."""
  records = iter(records)
  for record in records:
    if isinstance(record, Document) and record.mismatched:
      yield from _rotated([record, *records])
    else:
      yield record


def _rotated(records: list[Record]) -> Iterator[Record]:
  pairs = [record for record in records if isinstance(record, Document)]
  before = iter([*pairs[-1:], *pairs[:-1]])
  for record in records:
    if isinstance(record, Document):
      answer = next(before).turns[-1] if len(pairs) > 1 else record.others[0][-1]
      yield dataclasses.replace(record, others=(*record.others, (*record.turns[:-1], answer)), mismatched=False)
    else:
      yield record


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
