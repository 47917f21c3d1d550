"""Recipes, `--config.FIELD=VALUE` overrides and `--help`: how a command line becomes a Config, and a mistake one line.

A config is addressed by dotted names ('model.layers'). Flags, recipes, JSON files and sweeps all go through `override`,
so a field is checked the same way wherever its value came from.
"""

import ast
import collections
import contextlib
import dataclasses
import functools
import inspect
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from absl import app, flags

from gptjax.config.errors import Fault, UserError
from gptjax.config.schema import Config, Duration

Value = int | float | str | tuple
"""What a field can hold; bool is an int, and a tuple is of dataclasses or of values again."""

exit_stack = contextlib.ExitStack()
"""What a binary enters here is left when its main ends, with the exception that ends it."""

_BOOLEANS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}
_CONFIG_FLAG = re.compile(r'--?config(?:\.([^=]*))?(?:=(.*))?', re.DOTALL)
_HELP_FLAGS = {'--help', '-help', '-h', '-?', '--helpshort'}


def _hints(group: Any, prefix: str = '') -> dict[str, Any]:
  found: dict[str, Any] = {}
  for name, hint in typing.get_type_hints(group).items():
    found |= _hints(hint, f'{prefix}{name}.') if dataclasses.is_dataclass(hint) else {prefix + name: hint}
  return found


_FIELDS = _hints(Config)  # dotted name -> type, in the order of the schema


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in tree.items():
    flat |= _flatten(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value}
  return flat


def flatten(config: Any, prefix: str = '') -> dict[str, Value]:
  """Returns dotted names to values, in the order of the schema."""
  flat: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    name, value = prefix + field.name, getattr(config, field.name)
    flat |= flatten(value, f'{name}.') if dataclasses.is_dataclass(value) else {name: value}
  return flat


def differences(a: Config, b: Config) -> dict[str, tuple[Value, Value]]:
  """Returns the dotted names whose values differ, each with its (value in a, value in b)."""
  ours, theirs = flatten(a), flatten(b)
  return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def override(config: Config, values: Mapping[str, object], where: str = '') -> Config:
  """Returns config with the values of dotted names replaced, all at once: a group checks itself when all are in.

  Args:
    config: where every other value comes from.
    values: dotted name to value, as typed in the schema: {'model.width': 96, 'model.heads': 3}.
    where: what errors put before a name: '--config.', or a file and a colon.

  Raises:
    UserError: an unknown name, a value of another type, or one that the schema refuses.
  """
  for name, value in values.items():
    if name not in _FIELDS:
      raise _unknown(name, value, where)
  return _rebuild(config, {name: checked(_FIELDS[name], value, where + name) for name, value in values.items()})


def checked(hint: Any, value: Any, name: str) -> Any:
  """Returns the value as its hint has it: what JSON has as lists and objects becomes tuples and dataclasses.

  Raises:
    UserError: a value of another type; the error calls it `name`.
  """
  if item := _item(hint):
    if not isinstance(value, (list, tuple)):
      raise UserError(name, value, _expected(hint))
    return tuple(checked(item, one, f'{name}[{index}]') for index, one in enumerate(value))
  if dataclasses.is_dataclass(hint):
    return _checked_object(hint, value, name)
  if not _accepts(hint, value):
    raise UserError(name, value, _expected(hint), map(str, _choices(hint)))
  return float(value) if hint is float else value


def _checked_object(hint: Any, value: Any, name: str) -> Any:
  hints = typing.get_type_hints(hint)
  if isinstance(value, hint):
    value = {field: getattr(value, field) for field in hints}
  if not isinstance(value, dict):
    raise UserError(name, value, f'an object with {", ".join(hints)}')
  for field in value:
    if field not in hints:
      raise UserError(f'{name}.{field}', value[field], ', '.join(hints), list(hints), field)
  for field in dataclasses.fields(hint):
    if field.default is dataclasses.MISSING and field.name not in value:
      raise UserError(f'{name}.{field.name}', None, f'{_expected(hints[field.name])}; the field is missing')
  return hint(**{field: checked(hints[field], one, f'{name}.{field}') for field, one in value.items()})


def _rebuild(group: Any, values: Mapping[str, object], prefix: str = '') -> Any:
  new = {}
  for field in dataclasses.fields(group):
    name, old = prefix + field.name, getattr(group, field.name)
    new[field.name] = _rebuild(old, values, f'{name}.') if dataclasses.is_dataclass(old) else values.get(name, old)
  return dataclasses.replace(group, **new)


def _unknown(name: str, value: object, where: str) -> UserError:
  parts = name.split('.')
  levels = ('.'.join([*parts[:n], '']) for n in range(len(parts), -1, -1))
  level = next(level for level in levels if any(known.startswith(level) for known in _FIELDS))
  here = dict.fromkeys(known[len(level):].partition('.')[0] for known in _FIELDS if known.startswith(level))
  if level == f'{name}.':
    return UserError(where + name, value, f'only its fields, since it is a group: {", ".join(here)}')
  return UserError(where + name, value, ', '.join(here), _suggestions(where if where.startswith('--') else ''), name)


def _suggestions(prefix: str) -> dict[str, str]:
  """Returns what a mistyped name is compared with, to the name then suggested.

  People also leave out the groups of a field (kv_heads), or most of its name (lr): the ends of a name count too.
  """
  ends = {re.split('[._]', name)[-1]: prefix + name for name in reversed(_FIELDS)}  # reversed: the first field wins
  ends |= {name.rpartition('.')[2]: prefix + name for name in reversed(_FIELDS)}
  return ends | {name: prefix + name for name in _FIELDS}


def _choices(hint: Any) -> tuple[Any, ...]:
  return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _item(hint: Any) -> Any:
  """Returns the type of the items of a tuple[type, ...], else None."""
  return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _accepts(hint: Any, value: object) -> bool:
  if _choices(hint):
    return value in _choices(hint)
  if isinstance(value, bool) or hint is bool:
    return isinstance(value, bool) and hint is bool
  if hint is float:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # an int may be larger than any
  return isinstance(value, hint)


def _expected(hint: Any) -> str:
  if _choices(hint):
    return ', '.join(map(str, _choices(hint)))
  if item := _item(hint):
    if not dataclasses.is_dataclass(item):
      return 'a JSON list'
    first = next(iter(typing.get_type_hints(item)))
    return f"a JSON list of objects with {', '.join(typing.get_type_hints(item))}, as '[{{\"{first}\": ...}}]'"
  words = {int: 'an integer', float: 'a number', bool: 'true or false', str: 'text'}
  return words.get(hint, "a count of steps (2000), or one with its unit: '1.5e6 tokens', '3 epochs'")


def _parse(hint: Any, text: str | None) -> object:
  """Returns the typed value of a flag's text; where that is no such value, the text itself, for override to refuse."""
  if text is None or hint is None:
    return text
  if _choices(hint):
    return {str(choice): choice for choice in _choices(hint)}.get(text, text)
  if hint is bool:
    return _BOOLEANS.get(text.lower(), text)
  try:
    return json.loads(text) if _item(hint) else int(text) if hint == Duration else hint(text)
  except (ValueError, RecursionError):  # the latter of JSON, brackets in brackets
    return text


def to_json(config: Config) -> str:
  """Returns the config as JSON text, nested as in the schema; from_json gives back an equal config."""
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text: str, file: str = 'config.json') -> Config:
  """Returns the config that to_json wrote.

  Raises:
    UserError: not JSON, or a field that is unknown, missing or of another type; it names `file`.
  """
  try:
    tree = json.loads(text)
  except json.JSONDecodeError as error:
    line = text.split('\n')[error.lineno - 1]
    raise UserError(f'{file}:{error.lineno}', line[:80], f'JSON ({error.msg})') from error
  except (ValueError, RecursionError) as error:  # numbers too long for Python, brackets too deep
    raise UserError(file, text[:80], f'JSON of a config ({error})') from error
  if not isinstance(tree, dict):
    raise UserError(file, tree, 'an object of config fields')
  values = _flatten(tree)
  config = override(Config(), values, where=f'{file}: ')
  for name, hint in _FIELDS.items():
    if name not in values:
      raise UserError(f'{file}: {name}', None, f'{_expected(hint)}; the field is missing')
  return config


def read(file: pathlib.Path) -> Config:
  """Returns the config of a run's config.json.

  Raises:
    UserError: as from_json, or the file is no text.
  """
  try:
    return from_json(file.read_text(encoding='utf-8'), str(file))
  except UnicodeDecodeError as error:
    raise UserError(str(file), str(error), 'JSON of a config, in UTF-8') from None


def _shown(value: object) -> str:
  """Returns the value as one would type it after `--config.FIELD=` in a shell, where that fits on one line."""
  text = str(value).lower() if isinstance(value, bool) else str(value)
  if isinstance(value, tuple):
    text = json.dumps([one if isinstance(one, (int, float, str)) else dataclasses.asdict(one) for one in value])
  return shlex.quote(text) if text.isprintable() else repr(text)


def describe(config: Config) -> str:
  """Returns a line `model.layers = 12` a field, with a `# default 4` where it differs from the schema's default."""
  changed = differences(Config(), config)
  return '\n'.join(
      f'{name} = {_shown(value)}' + (f'  # default {_shown(changed[name][0])}' if name in changed else '')
      for name, value in flatten(config).items())


def load(path: str) -> Config:
  """Runs a recipe, a Python file with `get_config() -> Config`, and returns its config.

  Raises:
    UserError: no such file, a file that fails (the error names its line), no get_config, or not a Config.
  """
  if not pathlib.Path(path).is_file():
    raise _no_recipe(path)
  # Compiled here rather than imported: an import would leave a __pycache__ among the recipes, and trust it.
  recipe = types.ModuleType('recipe')
  recipe.__file__ = path
  try:
    exec(compile(pathlib.Path(path).read_bytes(), path, 'exec'), vars(recipe))
    if not callable(getattr(recipe, 'get_config', None)):
      raise UserError(path, 'no get_config', 'a recipe, a Python file with get_config() -> Config')
    config = recipe.get_config()
  except UserError:
    raise
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
      lines.append(error.lineno)
    place = f'{path}:{lines[-1]}' if lines else path
    raise UserError(place, error, 'a recipe whose get_config() returns a Config') from error
  if not isinstance(config, Config):
    raise UserError(f'{path}: get_config()', type(config).__name__, 'a gptjax.config.Config')
  return override(config, flatten(config), where=f'{path}: ')  # a dataclass does not check its types by itself


def _no_recipe(path: str) -> UserError:
  folders = dict.fromkeys([*([pathlib.Path(path).parent] if path else []), pathlib.Path('configs')])
  there = {file.stem: str(file) for folder in folders for file in sorted(folder.glob('*.py'))}
  expected = ', '.join(there.values()) or 'a recipe, a Python file with get_config() -> Config'
  return UserError('--config', path, expected, there, pathlib.Path(path).stem)


def run(main: Callable[[Any], int | None], *, needs_config: bool | None = True) -> None:
  """Parses the command line, calls main(config) and exits with the status it returns (None: 0).

  Flags that are not `--config...` are absl's: define them with absl.flags and read them in main. A UserError, here or
  in main, and any mistake in a flag prints one line on stderr, beginning with `error: `, and exits with 2.

  Args:
    main: gets the recipe's Config with the overrides in, or None where there is no recipe.
    needs_config: whether the binary takes `--config.FIELD=VALUE` and must be given `--config=RECIPE`; None: it may be given.
  """
  try:
    with exit_stack:
      app.run(main, flags_parser=functools.partial(_parse_command_line, needs_config=needs_config))
  except (UserError, Fault, OSError, KeyboardInterrupt) as error:
    if isinstance(error, BrokenPipeError):
      # Python must not try to flush the rest at exit.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status, line = exit_status(error)
    if line:
      print(line, file=sys.stderr, flush=True)
      if sys.__stderr__ and sys.stderr is sys.__stderr__:
        # Threads of libraries that outlive what they worked on would say the same again, in tracebacks. The file itself is closed to
        # them, since Python puts sys.stderr back before it takes modules down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stderr__.fileno())
    sys.exit(status)


def exit_status(error: BaseException) -> tuple[int, str | None]:
  """How a binary ends with an error: its exit status, and the line it says; '': none, None: a traceback."""
  match error:
    case UserError():
      return 2, f'error: {error}'
    case Fault():
      return 1, f'error: {error}'
    case BrokenPipeError():  # whoever read our output, such as head, has what they wanted
      return 0, ''
    case OSError():
      return 2, f'error: {error.filename or "system"}: {error.strerror or error}, expected: a place that can be read and written'
    case KeyboardInterrupt():
      return 130, ''  # 128 + SIGINT, as a shell reports it
  return 1, None


def _parse_command_line(argv: Sequence[str], *, needs_config: bool | None) -> Config | None:
  recipe: str | None = None
  texts: dict[str, str | None] = {}
  try:
    args = flags.FLAGS.read_flags_from_files(argv[1:])
    if needs_config is not False:
      recipe, texts, args = _split(args)
    if _HELP_FLAGS.intersection(args):
      print(_help((load(recipe) if recipe else Config()) if needs_config is not False else None))
      sys.exit(0)
    positional = flags.FLAGS([argv[0], *args])[1:]
  except UserError:
    raise
  except (flags.Error, ValueError) as error:
    raise _as_user_error(error, needs_config is not False) from error
  if positional:
    raise UserError('argument', positional[0], 'only flags, --NAME=VALUE; see --help')
  if recipe is None:
    if needs_config or texts:
      raise _no_recipe('')
    return None
  values = {name: _parse(_FIELDS.get(name), text) for name, text in texts.items()}
  return override(load(recipe), values, where='--config.')


def _split(args: Sequence[str]) -> tuple[str | None, dict[str, str | None], list[str]]:
  """Returns the recipe's path, the text of each override (None: it has no value; the last one wins), and other args."""
  recipe, texts, others = None, {}, []
  queue = collections.deque(args)
  while queue:
    arg = queue.popleft()
    if arg == '--':
      others += [arg, *queue]
      break
    match = _CONFIG_FLAG.fullmatch(arg)
    if not match:
      others.append(arg)
      continue
    name, text = match.groups()
    if text is None and _FIELDS.get(name) is bool:
      text = queue.popleft() if queue and queue[0].lower() in _BOOLEANS else 'true'
    elif text is None and queue and not queue[0].startswith('--'):
      text = queue.popleft()
    if name is None:
      recipe = text or ''
    else:
      texts[name] = text
  return recipe, texts, others


def own_flags() -> list[flags.Flag]:
  """The flags that the running binary and gptjax define, without those of absl and other libraries."""
  modules = flags.FLAGS.flags_by_module_dict().items()
  own = [found for module, found in modules if module == sys.argv[0] or module.partition('.')[0] in ('gptjax', 'tools')]
  return [flag for found in own for flag in found]


def _as_user_error(error: Exception, needs_config: bool) -> UserError:
  """Says what absl found wrong in our form: name, value, what is expected, and the nearest name."""
  if isinstance(error, flags.UnrecognizedFlagError):
    own = ['--config', '--config.FIELD'] * needs_config + [f'--{flag.name}' for flag in own_flags()]
    names = {}
    if needs_config:
      with_config = {f'config.{name}': f'--config.{name}' for name in _FIELDS}
      names = _suggestions('--config.') | with_config | {'config': '--config'}
    names |= {name: f'--{name}' for name in flags.FLAGS}
    value = str(error.flagvalue).partition('=')[2]
    return UserError(f'--{error.flagname}', value, f'{", ".join(own)}; see --help', names, error.flagname)
  if match := re.match(r'Missing value for flag -*(.*)', str(error)):
    return UserError(f'--{match[1]}', None, 'a value after it')
  cause = error.__context__  # what a flag's parser raised; None where a validator refused the value
  if isinstance(cause, UserError):
    return cause
  match = re.fullmatch(rf'flag --(\w+)=(.*?): ({re.escape(str(cause)) if cause else ".*"})', str(error), re.DOTALL)
  if not match:
    return UserError('flags', str(error), 'see --help')
  flag, value = flags.FLAGS[match[1]], match[2]
  if cause is None:
    missing = value == 'None'  # absl's way to say that a required flag is not there
    return UserError(f'--{flag.name}', None if missing else value, f'a value: {flag.help}' if missing else match[3])
  choices = getattr(flag.parser, 'enum_values', ())
  expected = ', '.join(choices) or flag.parser.syntactic_help or ('true or false' if flag.boolean else match[3])
  return UserError(f'--{flag.name}', value, expected, choices)


def docstrings(group: type) -> dict[str, str]:
  """The help text of each field of a config: its metadata, or the docstring under it, which Python itself throws away."""
  definition = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0]
  assert isinstance(definition, ast.ClassDef)
  lines = {field.name: field.metadata['help'] for field in dataclasses.fields(group) if 'help' in field.metadata}
  for field, line in zip(definition.body, definition.body[1:]):
    match field, line:
      case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
        lines[name] = inspect.cleandoc(text)
  return lines


def _help_sections(config: Any, prefix: str = '', title: str = '') -> dict[str, list[tuple[str, str]]]:
  rows: list[tuple[str, str]] = []
  groups: dict[str, list[tuple[str, str]]] = {}
  lines = docstrings(type(config))
  for field in dataclasses.fields(config):
    name, value, line = prefix + field.name, getattr(config, field.name), lines[field.name]
    if dataclasses.is_dataclass(value):
      groups |= _help_sections(value, f'{name}.', f'{name}: {line}')
    else:
      choices = f' [{"|".join(map(str, _choices(_FIELDS[name])))}]' if _choices(_FIELDS[name]) else ''
      rows.append((f'--config.{name}={_shown(value)}', line + choices))
  return {title or 'run': rows} | groups


def _help(config: Config | None) -> str:
  """Returns the help text; the defaults shown for config fields are config's."""
  main = sys.modules['__main__']
  program = f'-m {main.__spec__.name}' if main.__spec__ else sys.argv[0]
  own = [(f'--{flag.name}' + ('' if flag.default is None else f'={_shown(flag.default)}'), flag.help or '')
         for flag in own_flags()]
  sections = {'flags': own + [('--help', 'show this and stop')]}
  usage = f'usage: python {program} [--FLAG=VALUE ...]'
  if config is not None:
    usage = f'usage: python {program} --config=configs/NAME.py [--config.FIELD=VALUE ...] [--FLAG=VALUE ...]'
    recipe = ('--config', 'the recipe, a Python file with get_config() -> Config; with --help, its values are shown')
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
