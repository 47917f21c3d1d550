"""Chat templates: a conversation as the text that a published model was trained on."""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptjax.config import UserError

MARK = '\ufdd0'  # no character: it breaks a text that looks like a special token until special tokens are found


class ChatTemplate:
  """A Jinja template, rendered as transformers does, in a sandbox: it is a stranger's program.

  Args:
    source: the template.
    place: what an error calls it, such as its file.

  Raises:
    UserError: it is no template, or Jinja is not there.
  """

  def __init__(self, source: str, place: str):
    try:
      import jinja2
      import jinja2.sandbox
    except ImportError:
      raise UserError(place, 'a chat template', 'a machine with the jinja2 package: pip install jinja2') from None
    self._errors = jinja2.TemplateError
    self._place = place
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', _generation_tag()])
    environment.filters['tojson'] = _to_json
    environment.globals |= {'raise_exception': self._refuse, 'strftime_now': lambda form: datetime.datetime.now().strftime(form)}
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
      line = source.split('\n')[error.lineno - 1][:80]
      raise UserError(f'{place}, line {error.lineno}', line, f'a Jinja template ({error.message})') from None

  def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, object], special: re.Pattern[str] | None) -> str:
    """The text of a conversation.

    Args:
      messages: {'role': ..., 'content': ...} each.
      variables: what else the template may use.
      special: finds special tokens; those in messages come out with a MARK behind their first character.

    Raises:
      UserError: the template cannot make a text of these messages.
    """
    if not messages or not all(isinstance(message, Mapping) and 'role' in message for message in messages):
      raise UserError('messages', messages, 'one or more, each with a role and mostly a content')
    try:
      return self._template.render(messages=[_plain(message, special) for message in messages], **variables)
    except UserError:
      raise
    except (self._errors, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
      roles = [message.get('role') for message in messages]
      raise UserError('messages', roles, f'a conversation that {self._place} can write ({error})') from None

  def _refuse(self, message: str) -> None:
    raise self._errors(message)


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
  """Matches a special token, the longest; None where there are none."""
  longest = sorted(tokens, key=len, reverse=True)
  return re.compile('|'.join(map(re.escape, longest))) if longest else None


def _plain(value: Any, special: re.Pattern[str] | None) -> Any:
  """A message with its special tokens marked; a template sees plain data only, and no key without a value, as in transformers."""
  if isinstance(value, str):
    return re.sub(f'(?=(?:{special.pattern}))(.)', rf'\1{MARK}', value, flags=re.DOTALL) if special else value
  if isinstance(value, Mapping):
    return {str(key): _plain(one, special) for key, one in value.items() if one is not None}
  if isinstance(value, list | tuple):
    return [_plain(one, special) for one in value]
  if value is None or isinstance(value, bool | int | float):
    return value
  raise UserError('messages', type(value).__name__, 'texts, numbers, lists and objects of them')


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)  # not Jinja's: no HTML


def _generation_tag() -> Any:
  """The tag {% generation %} around what the assistant says: it changes no text."""
  import jinja2.ext

  class Generation(jinja2.ext.Extension):
    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      return jinja2.nodes.Scope(parser.parse_statements(('name:endgeneration',), drop_needle=True)).set_lineno(line)

  return Generation
