"""How a config and the flags are shown: the lines of `--print_config` and the text of `--help`."""

import ast
import dataclasses
import inspect
import json
import shlex
import shutil
import sys
import textwrap
from typing import Any

from absl import flags

from gptjax.config.fields import FIELDS, choices, differences, flatten
from gptjax.config.schema import Config


def shown(value: object) -> str:
  """Returns the value as it would be typed after `--config.FIELD=` in a shell."""
  text = str(value).lower() if isinstance(value, bool) else str(value)
  if isinstance(value, tuple):
    text = json.dumps([one if isinstance(one, (int, float, str)) else dataclasses.asdict(one) for one in value])
  return shlex.quote(text) if text.isprintable() else repr(text)


def describe(config: Config) -> str:
  """Returns one line per field, `model.layers = 12`, with `# default 4` where it differs from the default."""
  changed = differences(Config(), config)
  return '\n'.join(
      f'{name} = {shown(value)}' + (f'  # default {shown(changed[name][0])}' if name in changed else '')
      for name, value in flatten(config).items())


def docstrings(group: type) -> dict[str, str]:
  """Returns the help text of each field of a config: its metadata, or the docstring under it, which Python itself discards."""
  definition = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0]
  assert isinstance(definition, ast.ClassDef)
  lines = {field.name: field.metadata['help'] for field in dataclasses.fields(group) if 'help' in field.metadata}
  for field, line in zip(definition.body, definition.body[1:]):
    match field, line:
      case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
        lines[name] = inspect.cleandoc(text)
  return lines


def own_flags() -> list[flags.Flag]:
  """Returns the flags that the running binary and gptjax define, without those of absl and other libraries."""
  modules = flags.FLAGS.flags_by_module_dict().items()
  own = [found for module, found in modules if module == sys.argv[0] or module.partition('.')[0] in ('gptjax', 'tools')]
  return [flag for found in own for flag in found]


def _help_sections(config: Any, prefix: str = '', title: str = '') -> dict[str, list[tuple[str, str]]]:
  rows: list[tuple[str, str]] = []
  groups: dict[str, list[tuple[str, str]]] = {}
  lines = docstrings(type(config))
  for field in dataclasses.fields(config):
    name, value, line = prefix + field.name, getattr(config, field.name), lines[field.name]
    if dataclasses.is_dataclass(value):
      groups |= _help_sections(value, f'{name}.', f'{name}: {line}')
    else:
      allowed = f' [{"|".join(map(str, choices(FIELDS[name])))}]' if choices(FIELDS[name]) else ''
      rows.append((f'--config.{name}={shown(value)}', line + allowed))
  return {title or 'run': rows} | groups


def help_text(config: Config | None) -> str:
  """Returns the help text, with the values of a config as the defaults of its fields."""
  main = sys.modules['__main__']
  program = f'-m {main.__spec__.name}' if main.__spec__ else sys.argv[0]
  own = [(f'--{flag.name}' + ('' if flag.default is None else f'={shown(flag.default)}'), flag.help or '')
         for flag in own_flags()]
  sections = {'flags': own + [('--help', 'show this help and exit')]}
  usage = f'usage: python {program} [--FLAG=VALUE ...]'
  if config is not None:
    usage = f'usage: python {program} --config=configs/NAME.py [--config.FIELD=VALUE ...] [--FLAG=VALUE ...]'
    recipe = ('--config', 'recipe, a Python file with get_config() -> Config; its values are shown below')
    sections = {'flags': [recipe, *sections['flags']]} | _help_sections(config)
  width = min(shutil.get_terminal_size((100, 24)).columns, 120)
  column = min(max(len(left) for rows in sections.values() for left, _ in rows) + 4, 44, width // 2)
  lines = [*textwrap.wrap(usage, width, subsequent_indent='  ', break_on_hyphens=False)]
  for title, rows in sections.items():
    lines += ['', f'{title}:' if ':' not in title else title]
    for left, text in rows:
      first, *more = textwrap.wrap(text, width - column, break_on_hyphens=False) or ['']
      left = f'  {left}'
      lines += [f'{left:{column}}{first}'.rstrip()] if len(left) + 2 <= column else [left, ' ' * column + first]
      lines += [' ' * column + line for line in more]
  return '\n'.join(lines)
