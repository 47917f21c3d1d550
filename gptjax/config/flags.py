"""Command lines: recipes, `--config.FIELD=VALUE` overrides, `--help`, and how a program ends with an error."""

import ast
import collections
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import json
import os
import pathlib
import re
import select
import shlex
import shutil
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from gptjax import signals
from gptjax.config.checks import Fault, UserError, os_mistake
from gptjax.config.fields import BOOLEANS, FIELDS, choices, differences, flatten, nearest, override, parse, read_config, read_json
from gptjax.config.model import TRAINING_ONLY
from gptjax.config.schema import Config

exit_stack = contextlib.ExitStack()
"""Contexts that a program enters here are left when its `main` ends, with the exception that ended it."""

_CONFIG_FLAG = re.compile(r'--?config(?:\.([^=]*))?(?:=(.*))?', re.DOTALL)
_ADAPTED = (*TRAINING_ONLY, 'model.rope.', 'model.window', 'model.global_every')
"""Fields of a model that may change while its parameters keep their meaning."""
_HELP_FLAGS = {'--help', '-help', '-h', '-?', '--helpshort'}


def shipped(path: pathlib.Path | str) -> pathlib.Path:
  """A path or, if nothing is there, that of a file of gptjax's own configs/: in the package of a wheel, or beside it in a checkout."""
  path = pathlib.Path(path)
  if path.exists() or path.parts[:1] != ('configs',):
    return path
  return next((folder / path for folder in pathlib.Path(__file__).parents[1:3] if (folder / path).exists()), path)


def load(path: str) -> Config:
  """The config of a recipe, a Python file with `get_config() -> Config`, or of a run's config.json; a UserError, with the line, if that
  fails."""
  file = shipped(path)
  if not file.is_file():
    raise _no_recipe(path)
  if path.endswith('.json'):
    return read_json(file)
  config = returned(path, file, 'get_config', Config, 'a recipe, a Python file with get_config() -> Config')
  return override(config, flatten(config), where=f'{path}: ')  # dataclasses do not check types


def load_config(path: str | pathlib.Path = '', values: Mapping[str, object] | None = None, **more: object) -> Config:
  """The config of a recipe, of a run's config.json or of its workdir, by default the default one; with some values by their names, as
  load_config('configs/default.py', {'model.width': 96}, steps=100). Raises a UserError for a config that is not valid."""
  base = read_config(pathlib.Path(path)) if path and pathlib.Path(path).is_dir() else load(str(path)) if path else Config()
  return resolved(base, {**(values or {}), **more})


def returned(path: str, file: pathlib.Path, function: str, kind: type, expected: str) -> Any:
  """What a function of a Python file returns, which is to be of this kind; a UserError, with the line, if that fails.

  The file is compiled rather than imported: an import would write a __pycache__ next to it, and trust that.
  """
  module: dict[str, Any] = {'__name__': 'recipe', '__file__': path}
  try:
    exec(compile(file.read_bytes(), path, 'exec'), module)
    if not callable(module.get(function)):
      raise UserError(path, f'no {function}', expected)
    found = module[function]()
  except UserError:
    raise
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
      lines.append(error.lineno)
    place = f'{path}:{lines[-1]}' if lines else path
    raise UserError(place, error, f'{expected.partition(",")[0]} whose {function}() returns a {kind.__name__}') from error
  if not isinstance(found, kind):
    raise UserError(f'{path}: {function}()', type(found).__name__, f'a {kind.__module__.rpartition(".")[0]}.{kind.__name__}')
  return found


def _no_recipe(path: str) -> UserError:
  folders = dict.fromkeys([*([pathlib.Path(path).parent] if path else []), pathlib.Path('configs')])
  there = {file.stem: str(folder / file.name) for folder in folders for file in sorted(shipped(folder).glob('*.py'))}
  if path and (run := pathlib.Path(path) / 'config.json').is_file():
    there = {pathlib.Path(path).stem: str(run)}
  expected = ', '.join(there.values()) or 'a recipe, a Python file with get_config() -> Config'
  return UserError('--config', path, expected, there, pathlib.Path(path).stem)


def run(main: Callable[[Any], int | None], *, needs_config: bool | None = True) -> None:
  """Parses the command line, calls main(config) and exits with the status it returns (None: 0).

  Other flags are absl's. A UserError, here or in main, and any mistake in a flag prints one line `error: ...` on stderr and exits with 2.
  `needs_config`: whether the program requires `--config=RECIPE` and takes `--config.FIELD=VALUE`; None: both are optional. Without a recipe
  main gets None.
  """
  for stream in (sys.stdout, sys.stderr):  # a character that the terminal lacks is no reason to end
    if isinstance(stream, io.TextIOWrapper) and stream.errors == 'strict':
      stream.reconfigure(errors='backslashreplace')
  try:
    with signals.unwinding(), exit_stack:
      app.run(main, flags_parser=functools.partial(_parse_command_line, needs_config=needs_config))
  except (UserError, Fault, OSError, KeyboardInterrupt) as error:
    status, line = exit_status(error)
    if line is None:
      raise
    if status == 0:  # otherwise Python would fail to flush the rest at exit
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, signals.Interrupted):
      with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
      signals.end(error.number, line)
    if line:
      print(line, file=sys.stderr, flush=True)
      # Threads of libraries that are still running would print tracebacks of the same error.
      nothing: Callable[[Any], None] = lambda _: None
      sys.unraisablehook, threading.excepthook = nothing, nothing
    sys.exit(status)


def exit_status(error: BaseException) -> tuple[int, str | None]:
  """Returns the exit status for an error, and the line to print: '' for none, None for a traceback."""
  match error:
    case UserError():
      return 2, f'error: {error}'
    case Fault():
      return 1, f'error: {error}'
    case BrokenPipeError() if _has_no_reader(sys.stdout):
      return 0, ''
    case OSError() if mistake := os_mistake(error):
      return 2, f'error: {mistake}'
    case KeyboardInterrupt():
      return 130, str(error)  # 128 + SIGINT, as a shell reports it
  return 1, None


def _has_no_reader(stream: Any) -> bool:
  """Whether the program that reads a stream, such as head, has ended."""
  poll = select.poll()
  with contextlib.suppress(ValueError):  # a stream without a descriptor
    poll.register(stream, 0)
  return bool(poll.poll(0))


def _parse_command_line(argv: Sequence[str], *, needs_config: bool | None) -> Config | None:
  recipe: str | None = None
  texts: dict[str, str | None] = {}
  try:
    args = flags.FLAGS.read_flags_from_files(argv[1:])
    if needs_config is not False:
      recipe, texts, args = _split(args)
    if _HELP_FLAGS.intersection(args):
      print(help_text((load(recipe) if recipe else Config()) if needs_config is not False else None))
      sys.exit(0)
    for flag in own_flags():
      flag.allow_overwrite = False
    positional = flags.FLAGS([argv[0], *args])[1:]
    if 'verbosity' not in flags.FLAGS or not flags.FLAGS['verbosity'].present:
      logging.set_verbosity(logging.FATAL)  # of libraries, whose failures are raised as well
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
  values = {name: parse(FIELDS.get(name), text) for name, text in texts.items()}
  return resolved(load(recipe), values, where='--config.', workdir=str(getattr(flags.FLAGS, 'workdir', None) or ''))


def resolved(base: Config, values: Mapping[str, object], where: str = '', workdir: str = '') -> Config:
  """`override`, after the architecture and the tokenizer were taken from the run that init_from names, if one is there and must fit
  completely; or from that in `workdir`, if it has begun. A tokenizer that is named by its path stays."""
  if not values.get('init_partial', base.init_partial):
    init_from = str(values.get('init_from') or base.init_from)
    base = _with_architecture(_with_tokenizer(base, init_from, values, workdir), init_from, values, where, workdir)
  return override(base, values, where=where)


def _with_architecture(config: Config, init_from: str, given: Mapping[str, object], where: str, workdir: str) -> Config:
  """A config with the model of the run in `init_from` if there is one, but with its own dropout.

  Raises a UserError for a `given` value that contradicts that model, unless it only adapts it.
  """
  if workdir and any(pathlib.Path(os.path.expanduser(workdir), 'checkpoints').glob('*/config.json')):
    init_from = workdir if init_from else ''  # a run that resumes does not read the other one
  folder = pathlib.Path(os.path.expanduser(init_from))
  if not init_from or not (folder / 'config.json').is_file():  # a run that starts reports it
    return config
  model = {f'model.{name}': value for name, value in flatten(read_config(folder).model).items()}
  for name, value in given.items():
    if name in model and value != model[name] and not name.startswith(_ADAPTED):
      raise UserError(f'{where}{name}', value, f'{shown(model[name])}, as in {folder}, whose parameters the run starts from')
  return override(config, {name: value for name, value in model.items() if name not in TRAINING_ONLY})


def _with_tokenizer(config: Config, init_from: str, given: Mapping[str, object], workdir: str) -> Config:
  """A config with the tokenizer of the run or checkpoint in `init_from`, or if it is gone that of the run in `workdir`."""
  of_data = config.data
  if not init_from or of_data.tokenizer.path or of_data.train or any(name.startswith(('data.tokenizer.', 'data.train')) for name in given):
    return config
  runs = [pathlib.Path(os.path.expanduser(folder)) for folder in (init_from, workdir) if folder]
  found = [folder for run in runs for folder in (run / 'data' / 'tokenizer', run / 'tokenizer') if folder.is_dir()]
  return override(config, {'data.tokenizer.path': str(found[0])}) if found else config


def _split(args: Sequence[str]) -> tuple[str | None, dict[str, str | None], list[str]]:
  """Returns the recipe's path, the text of each override (None: no value; the last one wins), and the other arguments."""
  recipe, texts, others = None, {}, []
  queue = collections.deque(args)
  while queue:
    match = _CONFIG_FLAG.fullmatch(arg := queue.popleft())
    if not match:
      others.append(arg)
      continue
    name, text = match.groups()
    if text is None and FIELDS.get(name) is bool:
      text = queue.popleft() if queue and queue[0].lower() in BOOLEANS else 'true'
    elif text is None and queue and not queue[0].startswith('--'):
      text = queue.popleft()
    if name is None and text and recipe is not None:
      raise UserError('--config', text, f'one recipe; {recipe} was given before')
    if name is None:
      recipe = text or ''
    else:
      texts[name] = text
  return recipe, texts, others


def _as_user_error(error: Exception, needs_config: bool) -> UserError:
  """Converts an error of absl into one with the flag's name, its value, the expected values and the nearest name."""
  if isinstance(error, flags.UnrecognizedFlagError):
    own = ['--config', '--config.FIELD'] * needs_config + [f'--{flag.name}' for flag in own_flags()]
    names = {name: f'--{name}' for name in [*flags.FLAGS, *['config'] * needs_config]}
    if needs_config and not difflib.get_close_matches(error.flagname, names, cutoff=0.7):
      names = nearest(error.flagname, '--config.')
    value = str(error.flagvalue).partition('=')[2]
    return UserError(f'--{error.flagname}', value, f'{", ".join(own)}; see --help', names, error.flagname)
  if match := re.match(r'Missing value for flag -*(.*)', str(error)):
    return UserError(f'--{match[1]}', None, 'a value after it')
  cause = error.__context__  # raised by the flag's parser; None if a validator rejected the value
  if isinstance(cause, UserError):
    return cause
  match = re.fullmatch(rf'flag --(\w+)=(.*?): ({re.escape(str(cause)) if cause else ".*"})', str(error), re.DOTALL)
  if not match:
    return UserError('flags', str(error), 'see --help')
  flag, value = flags.FLAGS[match[1]], match[2]
  if cause is None and value == 'None':  # absl reports a missing required flag in this way
    return UserError(f'--{flag.name}', None, f'a value: {flag.help}')
  if cause is None and match[3].startswith('already defined as '):
    return UserError(f'--{flag.name}', value, f'one value; {shown(flag.value)} was given before')
  if cause is None:
    return UserError(f'--{flag.name}', value, match[3])
  allowed = getattr(flag.parser, 'enum_values', ())
  expected = ', '.join(allowed) or flag.parser.syntactic_help or ('true or false' if flag.boolean else match[3])
  return UserError(f'--{flag.name}', value, expected, allowed)


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
  """Returns the flags that the running program and gptjax define, without those of absl and other libraries."""
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
  script = f'python {sys.argv[0]}' if sys.argv[0].endswith('.py') else os.path.basename(sys.argv[0])
  program = f'python -m {main.__spec__.name}' if main.__spec__ else script
  own = [(f'--{flag.name}' + ('' if flag.default is None else f'={shown(flag.default)}'), flag.help or '') for flag in own_flags()]
  sections = {'flags': [*own, ('--help', 'show this help and exit')]}
  usage = f'usage: {program} [--FLAG=VALUE ...]'
  if config is not None:
    usage = f'usage: {program} --config=configs/NAME.py [--config.FIELD=VALUE ...] [--FLAG=VALUE ...]'
    recipe = ('--config', "recipe, a Python file with get_config() -> Config, or a run's config.json; its values are shown below")
    sections = {'flags': [recipe, *sections['flags']]} | _help_sections(config)
  width = min(shutil.get_terminal_size((100, 24)).columns, 120)
  column = min(max(len(left) for rows in sections.values() for left, _ in rows) + 4, 44, width // 2)
  lines = [*textwrap.wrap(usage, width, subsequent_indent='  ', break_on_hyphens=False)]
  for title, rows in sections.items():
    lines += ['', f'{title}:' if ':' not in title else title]
    for left, text in rows:
      first, *more = textwrap.wrap(text, width - column, break_on_hyphens=False) or ['']
      lines += [f'  {left:{column - 2}}{first}'.rstrip()] if len(left) + 4 <= column else [f'  {left}', ' ' * column + first]
      lines += [' ' * column + line for line in more]
  return '\n'.join(lines)
