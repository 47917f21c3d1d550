"""Chat templates, which write a conversation as the text that a published model was trained on."""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes, visitor

from gptjax.config import UserError
from gptjax.data.folders import library_errors
from gptjax.data.sources.source import ASSISTANT
from gptjax.data.tokenizers.published import any_of


class ChatTemplate:
  """A Jinja template, rendered as in transformers, in a sandbox because it is not trusted. Raises a UserError if it is invalid.

  It writes tokens under other names, `names`, so that they differ from the same texts in messages and tools. Where it looks for a
  token in a message (`'</think>' in content`, `content.split('</think>')`), the token keeps its text.
  """

  def __init__(self, source: str, location: str, names: Mapping[str, str]):
    self._location, self._names = location, names
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols', _GenerationTag])
    environment.filters['tojson'] = _to_json
    environment.globals |= {'raise_exception': _raise, 'strftime_now': lambda form: datetime.datetime.now().strftime(form)}
    self._token = re.compile(any_of(names))
    self.written: set[str] = set()
    """the tokens among the template's own texts"""
    try:
      template = _Renaming(self).visit(environment.parse(source))
      self._template = environment.from_string(template.set_environment(environment))
    except jinja2.TemplateSyntaxError as error:
      line = source.split('\n')[error.lineno - 1][:80]
      raise UserError(f'{location}, line {error.lineno}', line, f'a Jinja template ({error.message})') from None

  def rename(self, text: str) -> str:
    """Gives all tokens in a text of the template their other names."""
    self.written |= {*self._token.findall(text)}
    return self._token.sub(lambda found: self._names[found[0]], text)

  def around(self, before: str, after: str) -> dict[str, str]:
    """Texts by the role between two texts of the template, where they form a token: '<|' + role + '|>'."""
    found = {}
    for token, name in self._names.items():
      heads = [n for n in range(1, len(token) - 1) if before.endswith(token[:n])]
      for head, tail in ((n, m) for n in heads for m in range(n + 1, len(token)) if after.startswith(token[m:])):
        self.written.add(token)
        found[token[head:tail]] = before[:len(before) - head] + name + after[len(token) - tail:]
    return found

  def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, object]) -> str:
    """Renders a conversation. Raises a UserError if the template rejects it."""
    if not messages or not all(isinstance(message, Mapping) and 'role' in message for message in messages):
      raise UserError('messages', messages, 'one or more, each with a role and usually a content')
    roles = [message.get('role') for message in messages]
    errors = jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError
    with library_errors('messages', roles, f'a conversation that {self._location} accepts', errors):
      return self._template.render(messages=[_plain(message) for message in messages], **variables)


_DATE = {'strftime_now': datetime.datetime(2024, 7, 26).strftime}
"""What templates write as today's date into examples, which must not depend on the day; Llama's write this one where there is no clock."""


def answers(render: Callable[[Sequence[Mapping[str, Any]], bool, Mapping[str, object]], str], messages: Sequence[Mapping[str, Any]],
            tokens: Iterable[str], ends: Mapping[str, str], location: str) -> tuple[str, list[tuple[int, int, int]]]:
  """A conversation as text, and for each answer the number of its message, its first character and the one after its end.

  An answer begins where a prompt for it ends, and ends with the first control token after the text of the message.

  Args:
    render: a function (messages, whether to add the generation prompt, variables) -> text.
    tokens: all control tokens, as they are rendered.
    ends: those that end a text or a turn, by their names.
    location: of the template.

  Raises a UserError for an answer that generation would not give so, or not end.
  """
  text, spans = render(messages, False, _DATE), []
  end = re.compile(f'(?:(?!{any_of(tokens)}).)*?(?:{any_of(ends.values())})', re.DOTALL)
  for number, message in enumerate(messages):
    if message['role'] == ASSISTANT:
      start, content = render(messages[:number], True, _DATE) if number else '', message['content'].strip()
      at = text.find(content, len(start))
      found = end.match(text, at + len(content)) if at >= 0 else None
      if not (start and text.startswith(start) and found):
        why = ('after a first message' if not number else 'after its generation prompt' if not text.startswith(start) else
               f'as it is, and then a token that ends a text: {", ".join(ends) or "none is defined"}')
        raise UserError(f'messages[{number}]', content, f'an answer that {location} writes {why}')
      spans.append((number, len(start), found.end()))
  return text, spans


_SEARCHES = {'split', 'rsplit', 'partition', 'rpartition', 'startswith', 'endswith', 'removeprefix', 'removesuffix', 'strip', 'lstrip',
             'rstrip', 'find', 'rfind', 'index', 'rindex', 'count', 'replace'}
"""Methods and filters that look for their first argument in a text."""


class _Renaming(visitor.NodeTransformer):
  """Renames tokens in what a template writes, and not in what it compares with or looks for."""

  def __init__(self, template: ChatTemplate):
    self._template = template

  def visit_Const(self, node):
    if isinstance(node.value, str):
      node.value = self._template.rename(node.value)
    return node

  def visit_TemplateData(self, node):
    node.data = self._template.rename(node.data)
    return node

  def visit_Compare(self, node):
    return node

  visit_Test = visit_Compare

  def visit_Getitem(self, node):
    node.node = self.visit(node.node)
    return node

  def visit_Call(self, node):
    match node.node:
      case nodes.Name(name='raise_exception'):  # its text is for the user
        return node
      case nodes.Getattr(attr=name) if name in _SEARCHES:
        node.node = self.visit(node.node)
        node.args[1:] = map(self.visit, node.args[1:])
        return node
    return self.generic_visit(node)

  def visit_Filter(self, node):
    if node.name not in _SEARCHES:
      return self.generic_visit(node)
    node.node = node.node and self.visit(node.node)  # None in a {% filter %} block
    node.args[1:] = map(self.visit, node.args[1:])
    return node

  def visit_Add(self, node):
    operands = [node.right]
    while isinstance(node.left, nodes.Add):
      node = node.left
      operands.append(node.right)
    parts = self._joined([self.visit(one) for one in (node.left, *reversed(operands))])
    return functools.reduce(lambda left, right: nodes.Add(left, right, lineno=node.lineno), parts)

  def visit_Concat(self, node):
    node.nodes = self._joined([self.visit(one) for one in node.nodes])
    return node

  visit_Output = visit_Concat

  def _joined(self, parts):
    """Operands of a concatenation, with the three that can form a token around a role replaced by one."""
    for at in range(len(parts) - 3, -1, -1):
      before, role, after = parts[at:at + 3]
      if not any('role' in (getattr(one, 'name', 0), getattr(one, 'attr', 0), getattr(one, 'value', 0))
                 for one in (role, *role.find_all((nodes.Name, nodes.Getattr, nodes.Const)))):
        continue
      texts = [getattr(one, 'value', getattr(one, 'data', None)) for one in (before, after)]
      if all(isinstance(one, str) for one in texts) and (found := self._template.around(*texts)):
        get = nodes.Getattr(nodes.Const(found), 'get', 'load')
        whole = nodes.Concat([nodes.Const(texts[0]), role, nodes.Const(texts[1])])
        parts[at:at + 3] = [nodes.Call(get, [role, whole], [], None, None).set_lineno(role.lineno)]
    return parts


def _plain(value: Any) -> Any:
  """A message as plain data and, as in transformers, without keys whose value is None."""
  if isinstance(value, Mapping):
    return {str(key): _plain(one) for key, one in value.items() if one is not None}
  if isinstance(value, list | tuple):
    return [_plain(one) for one in value]
  if value is None or isinstance(value, str | bool | int | float):
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
