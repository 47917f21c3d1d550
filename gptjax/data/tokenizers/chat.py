"""Chat templates, which write a conversation as the text that a published model was trained on."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from gptjax.config import UserError
from gptjax.data.folders import library_errors
from gptjax.data.tokenizers.published import MARK


class ChatTemplate:
  """A Jinja template, rendered as in transformers, in a sandbox because it is not trusted. Raises a UserError if it is invalid."""

  def __init__(self, source: str, location: str):
    self._location = location
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', _GenerationTag])
    environment.filters['tojson'] = _to_json
    environment.globals |= {'raise_exception': _raise, 'strftime_now': lambda form: datetime.datetime.now().strftime(form)}
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
      line = source.split('\n')[error.lineno - 1][:80]
      raise UserError(f'{location}, line {error.lineno}', line, f'a Jinja template ({error.message})') from None

  def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, object], special: str) -> str:
    """Renders a conversation, with a MARK in what matches `special` in a message. Raises a UserError if the template rejects it."""
    if not messages or not all(isinstance(message, Mapping) and 'role' in message for message in messages):
      raise UserError('messages', messages, 'one or more, each with a role and usually a content')
    roles = [message.get('role') for message in messages]
    errors = jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError
    with library_errors('messages', roles, f'a conversation that {self._location} accepts', errors):
      return self._template.render(messages=[_plain(message, special) for message in messages], **variables)


def _plain(value: Any, special: str) -> Any:
  """A message with its special tokens marked, as plain data and, as in transformers, without keys whose value is None."""
  if isinstance(value, str):
    return re.sub(f'(?={special})(.)', rf'\1{MARK}', value, flags=re.DOTALL)
  if isinstance(value, Mapping):
    return {str(key): _plain(one, special) for key, one in value.items() if one is not None}
  if isinstance(value, list | tuple):
    return [_plain(one, special) for one in value]
  if value is None or isinstance(value, bool | int | float):
    return value
  raise UserError('messages', type(value).__name__, 'strings, numbers, lists and objects')


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  # Unlike Jinja's own filter, it does not escape HTML.
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _GenerationTag(jinja2.ext.Extension):
  """{% generation %} around the assistant's text, which does not change the output."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    return jinja2.nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True)).set_lineno(line)
