"""From a command line to a Config: overrides, recipes, help, JSON, and a one-line error for every mistake."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys
import typing
from unittest import mock

import pytest
from absl import app, flags
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import (
    Component, Config, Duration, ModelConfig, Phase, Reward, RopeConfig, UserError, ValidationSet, describe, differences, flatten,
    from_json, load, override, read_config, run, to_json, unescaped)
from gptjax.config.fields import FIELDS, choices, item_type
from gptjax.config.objective import LOSSES
from gptjax.files import atomic_directory, atomic_file, sync, write_atomic

TEXTS = [name for name, hint in FIELDS.items() if hint is str]
ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass
class Outcome:
  """The outcome of a command line."""

  status: object
  config: Config | None
  given: dict[str, object]
  out: str = ''
  err: str = ''

  @property
  def error(self) -> str:
    """The one line on stderr, after checking that there is one."""
    assert (self.status, self.config, self.out) == (2, None, '')
    assert self.err.startswith('error: ') and self.err.count('\n') == 1
    return self.err.removeprefix('error: ').rstrip('\n')


@contextlib.contextmanager
def a_binary():
  """A binary's flags instead of those that other imports have left in this process."""
  own = flags.FlagValues()
  train = {'flag_values': own, 'module_name': 'gptjax.train'}
  flags.DEFINE_string('workdir', 'runs', 'the folder of the run', **train)
  flags.DEFINE_integer('log_every', 10, 'steps between lines', lower_bound=1, **train)
  flags.DEFINE_boolean('print_config', False, 'print the config and stop', **train)
  flags.DEFINE_enum('backend', 'cpu', ['cpu', 'gpu'], 'where it runs', **train)
  flags.DEFINE_integer('from_a_library', 0, 'not ours', flag_values=own, module_name='absl.logging')
  flags.register_validator('workdir', lambda value: value != '/', 'not the root', flag_values=own)

  def run_once(main, flags_parser):  # absl's own keeps state for the life of the process
    sys.exit(main(flags_parser(sys.argv)))

  with mock.patch.object(flags, 'FLAGS', own), mock.patch.object(app, 'run', run_once):
    yield own


def outcome(*args, needs_config=True, main=lambda config: None):
  """Runs main as a binary with these arguments."""
  seen = Outcome(None, None, {})
  with a_binary() as own, mock.patch.object(sys, 'argv', ['train.py', *args]):

    def noting(config):
      seen.config, seen.given = config, own.flag_values_dict()
      return main(config)

    with pytest.raises(SystemExit) as stop:
      run(noting, needs_config=needs_config)
  seen.status = stop.value.code
  return seen


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
  """Runs a command line in a folder that has configs/base.py and configs/wide.py."""
  monkeypatch.chdir(tmp_path)
  pathlib.Path('configs').mkdir()
  recipe = 'from gptjax.config import *\ndef get_config():\n  return Config(model=ModelConfig(width={}))\n'
  pathlib.Path('configs/base.py').write_text(recipe.format(128))
  pathlib.Path('configs/wide.py').write_text(recipe.format(512))

  def once(*args, **kwargs):
    seen = outcome(*args, **kwargs)
    seen.out, seen.err = capsys.readouterr()
    return seen

  return once


# Overrides


@pytest.mark.parametrize('args, changed', [
    ([], {}),
    (['--config.model.layers=12'], {'model.layers': 12}),
    (['--config.model.layers', '12'], {'model.layers': 12}),
    (['-config.model.layers=1_2'], {'model.layers': 12}),
    (['--config.mesh.data', '-1', '--config.mesh.model=2'], {'mesh.model': 2}),
    (['--config.model.layers=3', '--config.model.layers=5'], {'model.layers': 5}),
    (['--config.optimizer.peak_lr=3e-4'], {'optimizer.peak_lr': 3e-4}),
    (['--config.optimizer.clip=2'], {'optimizer.clip': 2.0}),
    (['--config.data.source.path=a=b.txt'], {'data.source.path': 'a=b.txt'}),
    (['--config.data.source.path', 'x y.txt'], {'data.source.path': 'x y.txt'}),
    (['--config.eval.prompt=--\n1'], {'eval.prompt': '--\n1'}),
    (['--config.eval.prompt=12'], {'eval.prompt': '12'}),
    (['--config.data.tokenizer.kind=chars'], {'data.tokenizer.kind': 'chars'}),
    (['--config.steps=20'], {'steps': 20}),
    (['--config.steps', '3 epochs'], {'steps': '3 epochs'}),
    (['--config.compute.scan'], {'compute.scan': True}),
    (['--config.compute.scan', '--config.seed=1'], {'compute.scan': True, 'seed': 1}),
    (['--config.model.bias', 'no', '--config.seed=1'], {'model.bias': False, 'seed': 1}),
    *(([f'--config.model.bias={no}'], {'model.bias': False}) for no in ('false', 'False', '0', 'no')),
    *(([f'--config.compute.scan={yes}'], {'compute.scan': True}) for yes in ('true', 'TRUE', '1', 'yes')),
])
def test_a_field_is_overridden_by_its_dotted_name(command, args, changed):
  seen = command('--config=configs/base.py', *args)
  assert (seen.status, seen.err) == (None, '')
  assert {name: value for name, (_, value) in differences(Config(), seen.config).items()} == changed
  assert all(type(flatten(seen.config)[name]) is type(value) for name, value in changed.items())


def test_config_and_other_flags_mix_in_any_order(command):
  seen = command('--log_every', '3', '--config.seed=4', '--config', 'configs/wide.py', '--print_config', '--workdir=w')
  assert (seen.config.seed, seen.config.model.width) == (4, 512)
  assert (seen.given['log_every'], seen.given['print_config'], seen.given['workdir']) == (3, True, 'w')


@pytest.mark.parametrize('args, error', [
    (['--workdir=a', '--workdir=b'], "--workdir: 'b', expected: one value; a was given before"),
    (['--workdir', 'a', '--workdir', 'a'], "--workdir: 'a', expected: one value; a was given before"),
    (['--log_every=2', '-log_every', '3'], "--log_every: '3', expected: one value; 2 was given before"),
    (['--print_config', '--noprint_config'], "--print_config: 'false', expected: one value; true was given before"),
    (['--config=configs/wide.py'], "--config: 'configs/wide.py', expected: one recipe; configs/base.py was given before"),
])
def test_a_flag_that_is_given_twice_is_an_error(command, args, error):
  assert command('--config=configs/base.py', *args).error == error


def test_of_overrides_of_a_field_the_last_counts(command):
  assert command('--config=configs/base.py', '--config.seed=1', '--config.seed=2').config.seed == 2


def test_flags_may_come_from_a_file(command):
  pathlib.Path('flags.txt').write_text('--config=configs/wide.py\n--config.seed=4\n--log_every=3\n')
  seen = command('--flagfile=flags.txt', '--config.seed=5')
  assert (seen.config.seed, seen.config.model.width, seen.given['log_every']) == (5, 512, 3)


def test_overrides_are_checked_together(command):
  # 3 heads do not divide a width of 128, and 4 heads cannot share 3 key/value heads.
  recipe = '--config=configs/base.py'
  seen = command(recipe, '--config.model.heads=3', '--config.model.width=96', '--config.model.kv_heads=3')
  assert (seen.config.model.width, seen.config.model.heads, seen.config.model.kv_heads) == (96, 3, 3)
  assert command(recipe, '--config.model.heads=3').error.startswith('model.heads: 3, expected: a divisor')
  seen = command(recipe, '--config.optimizer.decay=10', '--config.optimizer.schedule=wsd')
  assert seen.config.optimizer.decay == 10


@pytest.mark.parametrize('arg, error', [
    ('--config.model.layer=3', "--config.model.layer: '3', expected: layers, *; did you mean --config.model.layers?"),
    ('--config.width=3', "--config.width: '3', expected: model, *, seed; did you mean --config.model.width?"),
    ('--config.kv_heads=3', "--config.kv_heads: '3', expected: model, *; did you mean --config.model.kv_heads?"),
    ('--config.lr=3', "--config.lr: '3', expected: model, *; did you mean --config.optimizer.peak_lr?"),
    ('--config.model.context=3', "--config.model.context: '3', *; did you mean --config.data.context?"),
    ('--config.model.layers.x=3', "--config.model.layers.x: '3', expected: layers, *, block; did you mean *"),
    ('--config.zzzzzz=3', "--config.zzzzzz: '3', expected: model, *, seed"),
    ('--config.=3', "--config.: '3', expected: model, *, seed"),
    ('--config.model=3', "--config.model: '3', expected: one of its fields, since it is a group: layers, *"),
    ('--config.data.tokenizer=3', "--config.data.tokenizer: '3', expected: one of its fields, *: kind, vocab_size, path"),
    ('--config.model.layers=many', "--config.model.layers: 'many', expected: an integer"),
    ('--config.model.layers=1.0', "--config.model.layers: '1.0', expected: an integer"),
    ('--config.model.layers=', "--config.model.layers: '', expected: an integer"),
    ('--config.model.layers', '--config.model.layers: None, expected: an integer'),
    ('--config.model.dropout=low', "--config.model.dropout: 'low', expected: a number"),
    ('--config.optimizer.clip=nan', '--config.optimizer.clip: nan, expected: a number'),
    ('--config.optimizer.clip=inf', '--config.optimizer.clip: inf, expected: a number'),
    ('--config.model.bias=maybe', "--config.model.bias: 'maybe', expected: true or false"),
    ('--config.data.source.path', '--config.data.source.path: None, expected: text'),
    ('--config.model.norm=rms', "--config.model.norm: 'rms', expected: layernorm, rmsnorm, rmsnorm1p; did you mean rmsnorm?"),
    ('--config.steps=soon', "steps: 'soon', expected: a count of steps (2000), or one with its unit: *"),
    ('--config.data.train=' + '[' * 100_000, "--config.data.train: '[[[*, expected: a JSON list of objects with *"),
    ('--config.steps=1e999', "steps: '1e999', expected: a count of steps *"),
    ('--config', "--config: '', expected: configs/base.py, configs/wide.py"),
    ('--log_evry=3', "--log_evry: '3', expected: --config, *, --log_every, *; see --help; did you mean --log_every?"),
    ('--layers=3', "--layers: '3', expected: --config, *; did you mean --config.model.layers?"),
    ('--confg=x', "--confg: 'x', expected: --config, *; did you mean --config?"),
    ('--cofig.seed=1', "--cofig.seed: '1', expected: --config, *; did you mean --config.seed?"),
    ('--log_every=a: b', "--log_every: 'a: b', expected: a positive integer"),
    ('--log_every=0', "--log_every: '0', expected: a positive integer"),
    ('--backend=gpus', "--backend: 'gpus', expected: cpu, gpu; did you mean gpu?"),
    ('--print_config=3', "--print_config: '3', expected: true or false"),
    ('--noprint_config=3', "flags: '--noprint_config=3 does not take an argument', expected: see --help"),
    ('--workdir', '--workdir: None, expected: a value after it'),
    ('--workdir=/', "--workdir: '/', expected: not the root"),
    ('--flagfile=none.txt', 'flags: *none.txt*, expected: see --help'),
    ('more', "argument: 'more', expected: only flags, --NAME=VALUE; see --help"),
])
def test_an_error_names_field_value_valid_values_and_nearest_name(command, arg, error):
  line = command('--config=configs/base.py', arg).error
  start, *parts = error.split('*')
  assert line.startswith(start) and line.endswith(parts[-1] if parts else start), line
  assert all(part in line for part in parts), line


@pytest.mark.parametrize('name, field', [
    ('optimizer.lr', 'optimizer.peak_lr'), ('learning_rate', 'optimizer.peak_lr'), ('bs', 'batch_size'), ('data.batch', 'batch_size'),
    ('n_layer', 'model.layers'), ('num_hidden_layers', 'model.layers'), ('model.n_head', 'model.heads'), ('n_kv_heads', 'model.kv_heads'),
    ('n_embd', 'model.width'), ('block_size', 'data.context'), ('max_iters', 'steps'), ('num_epochs', 'steps'),
    ('optimizer.warmup_steps', 'optimizer.warmup'), ('grad_clip', 'optimizer.clip'), ('gradient_accumulation_steps', 'microbatches'),
    ('wd', 'optimizer.weight_decay'), ('wieght_decay', 'optimizer.weight_decay'), ('vocab', 'model.vocab_size'),
    ('rope_theta', 'model.rope.theta'), ('checkpoint.evry', 'checkpoint.every'), ('modl.layrs', 'model.layers'),
    ('Sched', 'optimizer.schedule'),
    ('optimizer.type', None), ('optimizer.min_lr', None), ('model.activation', None), ('mesh.tp', None), ('x', None)])
def test_the_field_that_is_meant_is_suggested_or_none(command, name, field):
  line = command('--config=configs/base.py', f'--config.{name}=1').error
  assert line.endswith(f'; did you mean --config.{field}?') if field else 'did you mean' not in line, line
  if '.' not in name:  # a flag without --config
    line = command('--config=configs/base.py', f'--{name}=1').error
    assert line.endswith(f'; did you mean --config.{field}?') if field else 'did you mean' not in line, line


def test_a_flag_is_not_taken_for_the_value_of_the_flag_before_it(command):
  error = command('--config=configs/base.py', '--config.data.source.path', '--log_every=3').error
  assert error == '--config.data.source.path: None, expected: text'


# Recipes


@pytest.mark.parametrize('value', ['10**400', '10**5000'])
def test_a_number_larger_than_any_float_is_an_error(command, value):
  pathlib.Path('huge.py').write_text(f'from gptjax.config import *\ndef get_config():\n  return Config(z_loss={value})\n')
  line = command('--config=huge.py').error
  assert line.startswith('huge.py: z_loss: ') and line.endswith(', expected: a number') and len(line) < 300


@pytest.mark.parametrize('text', ['[' * 100_000, '{"seed": ' + '9' * 5000 + '}'])
def test_json_that_python_cannot_represent_is_an_error(text):
  with pytest.raises(UserError, match='^config.json: .*expected: JSON of a config'):
    from_json(text)


def test_a_config_that_is_not_utf8_is_an_error(tmp_path):
  (tmp_path / 'config.json').write_bytes(b'{"seed": \xff}')
  with pytest.raises(UserError, match="config.json: .*can't decode.*expected: JSON of a config"):
    read_config(tmp_path)


@pytest.mark.parametrize('path, error', [
    ('configs/bas.py', "'configs/bas.py', expected: configs/base.py, configs/wide.py; did you mean configs/base.py?"),
    ('base', "'base', expected: configs/base.py, configs/wide.py; did you mean configs/base.py?"),
    ('configs', "'configs', expected: configs/base.py, configs/wide.py"),
    ('zzz.py', "'zzz.py', expected: configs/base.py, configs/wide.py"),
])
def test_a_missing_recipe_is_an_error(command, path, error):
  assert command(f'--config={path}').error == f'--config: {error}'


def test_the_recipe_is_required(command):
  assert command('--config.seed=3').error == "--config: '', expected: configs/base.py, configs/wide.py"


def test_the_config_of_a_run_is_a_recipe(command):
  pathlib.Path('run').mkdir()
  file = pathlib.Path('run/config.json')
  file.write_text(to_json(override(Config(), {'model.width': 96, 'model.heads': 3, 'steps': '3 epochs'})))
  seen = command('--config=run/config.json', '--config.model.layers=7')
  assert differences(Config(), seen.config) == {'model.layers': (4, 7), 'model.width': (128, 96), 'model.heads': (4, 3),
                                                'steps': (1000, '3 epochs')}
  assert command('--config=run').error.endswith('did you mean run/config.json?')
  text = file.read_text()
  file.write_text(text.replace('"layers"', '"n_layers"'))
  assert command('--config=run/config.json').error.startswith('run/config.json: model.n_layers: 4, expected: layers, ')
  file.write_text(text.replace('"seed": 0', '"zero_stage": 0'))
  assert command('--config=run/config.json').error == 'run/config.json: seed: None, expected: an integer; the field is missing'


def a_run(folder, **values):
  """Writes the config.json of a folder."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(to_json(override(Config(), {f'model.{name}': value for name, value in values.items()})))


def test_the_architecture_is_that_of_the_run_whose_parameters_are_taken(command):
  a_run('other', width=96, heads=3, mlp='swiglu', window=8)
  base = ('--config=configs/wide.py', '--config.init_from=other')
  model = ModelConfig(width=96, heads=3, mlp='swiglu', window=8)
  assert command(*base).config.model == model
  assert command(*base, '--config.model.width=96', '--workdir=new').config.model == model  # given, and the same
  adapted = command(*base, '--config.model.window=16', '--config.model.dropout=0.1', '--config.model.rope.theta=2e4').config.model
  assert adapted == dataclasses.replace(model, window=16, dropout=0.1, rope=RopeConfig(theta=2e4))
  for name, value, theirs in (('width', '192', '96'), ('heads', '6', '3'), ('mlp', 'geglu', 'swiglu'), ('layers', '2', '4')):
    assert f', expected: {theirs}, as in other' in command(*base, f'--config.model.{name}={value}').error
  assert command(*base, '--config.init_partial').config.model == ModelConfig(width=512)
  assert command('--config=configs/wide.py', '--config.init_from=nowhere').config.model == ModelConfig(width=512)  # told by the run


def test_the_tokenizer_is_that_of_the_run_whose_parameters_are_taken(command):
  for folder, tokenizer in (('other', 'data/tokenizer'), ('other/checkpoints/3', 'tokenizer'), ('new', 'data/tokenizer')):
    a_run(folder)
    pathlib.Path(folder, tokenizer).mkdir(parents=True)
  def path(*args):
    found = command('--config=configs/wide.py', *args)
    assert found.config, found.error
    return found.config.data.tokenizer.path

  assert path('--config.init_from=other') == 'other/data/tokenizer'
  assert path('--config.init_from=other/checkpoints/3') == 'other/checkpoints/3/tokenizer'
  assert path('--config.init_from=other', '--workdir=new') == 'other/data/tokenizer'
  assert path('--config.init_from=gone', '--workdir=new') == 'new/data/tokenizer'  # a run that resumes needs no other
  assert path('--config.init_from=other', '--config.data.tokenizer.path=mine') == 'mine'
  stores = '--config.data.train=[{"store": "s"}]', '--config.data.valid=[{"name": "v", "store": "t"}]'
  for own in (['--config.init_partial'], ['--config.data.tokenizer.kind=bytes'], stores):
    assert path('--config.init_from=other', *own) == '', own
  assert path('--workdir=new') == ''
  chat = ('--config.data.source.chat=template', '--config.data.source.messages=m', '--config.objective.kind=sft',
          '--config.data.rows=pack')
  assert path('--config.init_from=other', *chat) == 'other/data/tokenizer'
  assert path('--config.init_from=gone', *chat) == ''  # reported by the run
  for more in ([], ['--config.init_from=other', '--config.init_partial']):
    assert command('--config=configs/wide.py', *chat, *more).error.startswith("data.tokenizer.path: ''")


def test_a_run_that_resumes_keeps_its_architecture_without_the_other(command):
  a_run('new/checkpoints/3', width=96, heads=3)
  a_run('other', width=64)
  pathlib.Path('new/config.json').write_text(pathlib.Path('new/checkpoints/3/config.json').read_text())
  assert command('--config=configs/wide.py', '--config.init_from=other', '--workdir=new').config.model.width == 96
  assert command('--config=configs/wide.py', '--config.init_from=gone', '--workdir=new').config.model.width == 96


@pytest.mark.parametrize('text, error', [
    ('x = 1', "r.py: 'no get_config', expected: a recipe, a Python file with get_config() -> Config"),
    ('def get_config():\n  return 3', "r.py: get_config(): 'int', expected: a gptjax.config.Config"),
    ('def get_config():\n  x = 1\n  return x / 0', "r.py:3: ZeroDivisionError('division by zero'), expected: *"),
    ('def get_config(\n', 'r.py:1: SyntaxError(*), expected: *'),
    ('import nowhere_to_be_found', "r.py:1: ModuleNotFoundError(*nowhere_to_be_found*), expected: *"),
    ('from gptjax.config import *\ndef get_config():\n  return Config(\n      no=3)', 'r.py:3: TypeError(*no*), *'),
    ('from gptjax.config import *\ndef get_config():\n  return ModelConfig(heads=3)', 'model.heads: 3, expected: *'),
    ('from gptjax.config import *\ndef get_config():\n  return Config(model=ModelConfig(mlp="gelo"))',
     "r.py: model.mlp: 'gelo', expected: gelu, swiglu, geglu; did you mean gelu?"),
    ('from gptjax.config import *\ndef get_config():\n  return Config(model=ModelConfig(layers=2.5))',
     'r.py: model.layers: 2.5, expected: an integer'),
])
def test_an_error_in_a_recipe_names_its_line(command, text, error):
  pathlib.Path('r.py').write_text(text)
  line = command('--config=r.py').error
  start, *parts = error.split('*')
  assert line.startswith(start), line
  assert all(part in line for part in parts), line


def test_a_recipe_is_read_again_each_time_and_leaves_no_files(tmp_path):
  path = tmp_path / 'r.py'
  for seed in (1, 2):
    path.write_text(f'from gptjax.config import Config\ndef get_config():\n  return Config(seed={seed})\n')
    assert load(str(path)).seed == seed
  assert list(tmp_path.iterdir()) == [path]


# What main may do


def test_main_may_raise_a_user_error_or_return_a_status(command):
  def fails(config):
    raise UserError('--stop_at', 3, 'a step\nafter 10')

  seen = command('--config=configs/base.py', main=fails)
  seen.config = None
  assert seen.error == '--stop_at: 3, expected: a step after 10'
  assert command('--config=configs/base.py', main=lambda config: 7).status == 7


def test_an_interrupt_exits_with_130_and_prints_nothing(command):
  def interrupted(config):
    raise KeyboardInterrupt

  seen = command('--config=configs/base.py', main=interrupted)
  assert (seen.status, seen.out, seen.err) == (130, '', '')


@pytest.mark.parametrize('bug', [
    ValueError('a defect'), TimeoutError('a defect'), ConnectionResetError(errno.ECONNRESET, 'a defect'), OSError('a defect'),
    socket.gaierror(socket.EAI_NONAME, 'a defect'), BrokenPipeError(errno.EPIPE, 'a defect'), ChildProcessError(errno.ECHILD, 'a defect')],
    ids=lambda bug: type(bug).__name__)
def test_a_bug_keeps_its_traceback(command, bug):
  def breaks(config):
    raise bug

  argv = mock.patch.object(sys, 'argv', ['train.py', '--config=configs/base.py'])
  with a_binary(), argv, pytest.raises(type(bug), match='a defect'):
    run(breaks)


def _full_disk(path):
  with atomic_file(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as writing does, it names no file


def _missing_input(path):
  with atomic_file(path):
    sync(pathlib.Path('other'))


@pytest.mark.parametrize('fails, error', [
    (lambda: _missing_input(pathlib.Path('x')), "write x: gptjax.files.sync other: 'No such file or directory', expected: an existing *"),
    (lambda: write_atomic(pathlib.Path('no/x.json'), ''), "write no/x.json: 'No such file or directory', expected: an existing *"),
    (lambda: write_atomic(pathlib.Path('configs/base.py/x'), ''), "write configs/base.py/x: 'Not a directory', expected: a folder, *"),
    (lambda: write_atomic(pathlib.Path('x' * 300), ''), "write xxx*x...: 'File name too long', expected: a shorter path"),
    (lambda: _full_disk(pathlib.Path('x')), "write x: 'No space left on device', expected: a disk with space left"),
    (lambda: atomic_directory(pathlib.Path('configs/base.py/x/y')).__enter__(), "create configs/base.py/x/y: 'Not a directory', *"),
    (lambda: sync(pathlib.Path('other')), "gptjax.files.sync other: 'No such file or directory', expected: an existing *"),
])
def test_an_error_of_the_system_names_the_operation_and_the_path(command, fails, error):
  line = command('--config=configs/base.py', main=lambda config: fails()).err
  start, *rest = error.split('*')
  assert line.startswith(f'error: {start}') and all(part in line for part in rest) and line.count('\n') == 1, line


def test_what_exit_handlers_print_is_seen_after_an_error():
  program = 'import atexit, sys; from gptjax.config import run; atexit.register(print, "at exit", file=sys.stderr); run(None)'
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and [line[:7] for line in done.stderr.splitlines()] == ['error: ', 'at exit'], done.stderr


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1'])
def test_a_terminal_without_a_character_gets_its_escape(encoding, tmp_path):
  program = "from gptjax.config import run; run(lambda config: print('\u00e9\u4e16'), needs_config=False)"
  done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, env={'PYTHONIOENCODING': encoding})
  assert (done.returncode, done.stderr) == (0, b'')
  assert done.stdout == 'é世\n'.encode(encoding, 'backslashreplace')


def test_a_binary_without_a_recipe_takes_only_its_own_flags(command):
  seen = command('--workdir=w', needs_config=False)
  assert (seen.status, seen.config, seen.given['workdir']) == (None, None, 'w')
  error = command('--config=configs/base.py', needs_config=False).error
  assert error.startswith("--config: 'configs/base.py', expected: --workdir, --log_every, ")
  assert '--config.FIELD' not in error
  assert '--config' not in command('--help', needs_config=False).out


# Help


@pytest.mark.parametrize('flag', ['--help', '-h', '-help'])
def test_help_shows_own_flags_then_every_field_with_its_default(command, flag):
  seen = command(flag)
  assert (seen.status, seen.err) == (0, '')
  lines = [line.split() for line in seen.out.splitlines()]
  shown = [line[0] for line in lines if line and line[0].startswith('--')]
  own = ['--config', '--workdir=runs', '--log_every=10', '--print_config=false', '--backend=cpu', '--help']
  assert shown[:len(own)] == own
  fields = [f'--config.{line.replace(" = ", "=")}' for line in describe(Config()).splitlines()]
  assert sorted(shown[len(own):]) == sorted(fields)
  assert ['--config.model.layers=4', 'transformer', 'blocks'] in lines
  assert '[learned|rope]' in seen.out


@pytest.mark.parametrize('width', [50, 80, 110])
def test_help_wraps_to_the_terminal_in_one_column(command, monkeypatch, width):
  monkeypatch.setenv('COLUMNS', str(width))
  lines = command('--help').out.splitlines()
  assert max(map(len, lines)) <= width
  texts = [line for line in lines if line.startswith('   ')]
  assert len({len(line) - len(line.lstrip()) for line in texts}) == 1


def test_help_shows_the_defaults_of_a_recipe_and_overlooks_other_mistakes(command):
  seen = command('--config=configs/wide.py', '--config.nothing=1', '--help', '--nor_this')
  assert seen.status == 0 and '--config.model.width=512 ' in seen.out
  assert command('--config=configs/wid.py', '--help').error.endswith('did you mean configs/wide.py?')


# Names, values and text


def test_flatten_and_differences_name_fields_by_dots():
  other = Config(seed=3, model=ModelConfig(layers=12))
  assert flatten(other)['model.layers'] == 12
  assert list(flatten(other)) == list(FIELDS)
  assert differences(Config(), other) == {'model.layers': (4, 12), 'seed': (0, 3)}


def test_describe_marks_what_differs_from_the_default():
  lines = describe(override(Config(), {'model.layers': 12, 'eval.prompt': 'a\nb', 'steps': '3 epochs'})).splitlines()
  assert len(lines) == len(FIELDS)
  assert {'model.layers = 12  # default 4', r"eval.prompt = 'a\nb'  # default ''", "steps = '3 epochs'  # default 1000",
          'model.bias = true', 'model.width = 128'} <= set(lines)


@pytest.mark.parametrize('values, error', [
    ({'model.layer': 3}, 'model.layer: 3, expected: layers, *; did you mean model.layers?'),
    ({'model.layers': '3'}, "model.layers: '3', expected: an integer"),
    ({'model.layers': True}, 'model.layers: True, expected: an integer'),
    ({'model.bias': 1}, 'model.bias: 1, expected: true or false'),
    ({'steps': 1.5}, 'steps: 1.5, expected: a count of steps *'),
    ({'model': ModelConfig()}, 'model: *, expected: one of its fields, *'),
])
def test_override_checks_names_and_types(values, error):
  with pytest.raises(UserError) as caught:
    override(Config(), values)
  assert all(part in str(caught.value) for part in error.split('*'))


@pytest.mark.parametrize('edit, error', [
    (('"layers"', '"layer"'), 'run.json: model.layer: 4, expected: layers, *; did you mean model.layers?'),
    (('"seed": 0', '"zero_stage": 0'), 'run.json: seed: None, expected: an integer; the field is missing'),
    (('"layers": 4', '"layers": "4"'), "run.json: model.layers: '4', expected: an integer"),
    (('"clip": 1.0', '"clip": NaN'), 'run.json: optimizer.clip: nan, expected: a number'),
    (('"layers": 4,', '"layers" 4,'), 'run.json:3: *layers*, expected: JSON (*)'),
    ((to_json(Config()), '[]'), 'run.json: [], expected: an object of config fields'),
    ((to_json(Config()), ''), "run.json:1: '', expected: JSON (*)"),
])
def test_an_error_in_json_names_its_file(edit, error):
  with pytest.raises(UserError) as caught:
    from_json(to_json(Config()).replace(*edit), 'run.json')
  start, *parts = error.split('*')
  assert str(caught.value).startswith(start), str(caught.value)
  assert all(part in str(caught.value) for part in parts), str(caught.value)


def _values(hint):
  if choices(hint):
    own = ['mine:thing'] if typing.get_origin(hint) is typing.Union else []
    return st.sampled_from([*choices(hint), *own])
  if item := item_type(hint):
    return st.just(()) if dataclasses.is_dataclass(item) else st.lists(_values(item), max_size=3).map(tuple)
  counts = st.integers(1, 10**9)
  return {
      bool: st.booleans(), int: counts, float: st.floats(0, 1, exclude_min=True, exclude_max=True), str: st.text(),
      Duration: counts | st.builds('{}{}'.format, counts, st.sampled_from([' steps', ' tokens', 'epochs'])),
  }[hint]


@st.composite
def _objectives(draw, values, examples):
  """Fields of objective.* and lora.* that belong to the kind of data, and what they require of others."""
  fixed = {name: value for name, value in flatten(Config()).items() if name.startswith(('objective.', 'lora.'))}
  fixed = {**fixed, 'objective.kind': values['objective.kind'], 'data.source.mismatched': False}
  fixed |= {'z_loss': 0.0} if examples in ('pairs', 'grpo', 'messages') else {}
  if examples == 'messages':
    fixed |= {'objective.teacher': 'run', 'objective.temperature': values['objective.temperature'],
              'objective.loss': draw(st.sampled_from(['', *LOSSES['distillation']]))}
  if examples == 'pairs':
    loss = draw(st.sampled_from(['', *LOSSES['preference']]))
    mine = {'objective.loss': loss, **{name: values[name] for name in ('objective.beta', 'objective.chosen_weight')}}
    if loss in ('', 'dpo', 'dpo_norm', 'robust'):
      mine['objective.smoothing'] = values['objective.smoothing'] / 2
    if loss == 'simpo':
      mine['objective.margin'] = values['objective.margin']
    fixed |= mine | {'data.source.mismatched': loss == 'kto', 'data.source.supervised': 'answers', 'data.long_examples': 'drop',
                     'init_from': 'run'}
  if examples == 'grpo':
    group, tokens = draw(st.integers(2, 16)), draw(st.integers(1, 1000))
    fixed |= {name: values[name] for name in ('objective.clip', 'objective.clip_high', 'objective.kl', 'objective.count_truncated')} | {
      'objective.loss': draw(st.sampled_from(['', *LOSSES['grpo']])), 'data.source.supervised': 'answers',
      'objective.rewards': (Reward('exact', 0.5), Reward('format', 1.0, 'a+')),
      'objective.group': group, 'objective.max_tokens': tokens, 'objective.rollout_steps': draw(st.integers(1, 9)), 'init_from': 'run',
      'data.context': tokens + draw(st.integers(1, 100)), 'data.rows': 'document', 'batch_size': values['batch_size'] * group}
  if draw(st.booleans()):
    fixed |= {name: value for name, value in values.items() if name.startswith('lora.')} | {
      'lora.targets': ('blocks/*',), 'init_from': 'run', 'init_partial': False, 'frozen': (), 'optimizer.name': 'adamw'}
  return fixed


@st.composite
def configs(draw):
  """Any valid config: by type, and where fields depend on each other, as they do."""
  values = {name: draw(_values(hint)) for name, hint in FIELDS.items()}
  kv_heads, group, pairs, microbatches = (draw(st.integers(1, 8)) for _ in range(4))
  values |= {
      'model.kv_heads': draw(st.sampled_from([0, kv_heads])), 'model.heads': kv_heads * group,
      'model.width': kv_heads * group * 2 * pairs, 'model.head_size': draw(st.sampled_from([0, 2 * pairs])),
      'model.rope.low': 0.5, 'model.rope.high': 1 + draw(_values(float)), 'data.tokenizer.vocab_size': draw(st.integers(300, 10**6)),
      'model.layers': draw(st.integers(1, 10_000)), 'data.prefetch': draw(st.integers(0, 1000)), 'data.workers': draw(st.integers(0, 1000)),
      'mesh.data': draw(st.just(-1) | st.integers(1, 64)), 'zero_stage': draw(st.integers(0, 3)),
      'microbatches': microbatches, 'batch_size': microbatches * draw(st.integers(1, 64)),
  }
  examples, some = draw(st.sampled_from(['', 'prompt', 'messages', 'label', 'pairs', 'grpo'])), st.text('a"é #', min_size=1)
  values |= {f'data.source.{name}': draw(some) if examples in kinds else '' for name, kinds in (
    ('prompt', ('prompt', 'pairs', 'grpo')), ('completion', ('prompt', 'grpo')), ('messages', ('messages',)), ('label', ('label',)),
    ('chosen', ('pairs',)), ('rejected', ('pairs',)))}
  values |= {'data.source.labels': ('a"', 'é', 'b') if examples == 'label' else ()}
  values |= {'data.source.text': 'text', 'data.source.chat': draw(st.sampled_from(['template', 'plain']))} if examples not in (
    '', 'label') else {'data.source.chat': '', 'data.source.supervised': 'answers'}
  if examples:
    values |= {'data.rows': 'pack', 'data.isolate_documents': True, 'data.tokenizer.path': 'tokenizer',
               'objective.kind': {'label': 'classification', 'pairs': 'preference', 'grpo': 'grpo',
                                  'messages': 'distillation'}.get(examples, 'sft')}
  elif values['objective.kind'] in LOSSES:
    values['objective.kind'] = 'next_token'
  values |= draw(_objectives(values, examples))
  if draw(st.booleans()):
    stores = draw(st.lists(st.text(min_size=1), min_size=1, max_size=3, unique=True))
    weight = draw(st.sampled_from([0.0, 0.5, 2.0]))
    values |= {
        'data.train': tuple(Component(store, weight, draw(st.sampled_from([0.0, 1.5]))) for store in stores),
        'data.phases': tuple(Phase(start, (1.0,) * len(stores)) for start in draw(st.lists(_values(Duration), max_size=2))),
        'data.valid': (ValidationSet('a', draw(st.text()), ('x', 'y')), ValidationSet('b-1', draw(st.text()))),
    } | {name: value for name, value in flatten(Config()).items() if name.startswith('data.source.')}
  named = draw(st.booleans())
  values |= {'compute.saved': ('q', 'block') if named else (), 'compute.offloaded': ('up',) if named else ()}
  if named:
    values['compute.remat'] = 'names'
  if not values['data.prefetch']:
    values['data.workers'] = 0
  if values['pipeline.schedule'] != 'Interleaved1F1B':
    values['pipeline.chunks'] = 1
  experts = 0 if examples in ('pairs', 'grpo') else draw(st.integers(0, 64))
  values |= {'model.experts': experts, 'model.expert_every': 1, 'model.experts_per_token': draw(st.integers(1, max(experts, 1)))}
  if not experts:
    values |= {name: value for name, value in flatten(Config()).items()
               if name.startswith(('model.router.', 'model.expert_width', 'model.shared_experts'))}
  values['optimizer.decay'] = draw(st.integers(1, 10**6)) if values['optimizer.schedule'] == 'wsd' else 0
  if values['checkpoint.keep_best']:
    values['eval.rows'] = 0
  if values['model.mup_base']:
    values['model.scaled_embedding'] = False
  if values['optimizer.name'] == 'lion':
    values['optimizer.b2'] = 0.98
  return override(Config(), values)


@pytest.mark.parametrize('value, error', [
    ('books', "--config.data.train: 'books', expected: a JSON list of objects with store, weight, epochs, as '[{\"store\": ...}]'"),
    ('["books"]', "--config.data.train[0]: 'books', expected: an object with store, weight, epochs"),
    ('[{"stor": "a"}]', "--config.data.train[0].stor: 'a', expected: store, weight, epochs; did you mean store?"),
    ('[{"weight": 1}]', '--config.data.train[0].store: None, expected: text; the field is missing'),
    ('[{"store": "a", "weight": "1"}]', "--config.data.train[0].weight: '1', expected: a number"),
    ('[{"store": "a", "weight": -1}]', 'data.train: weight: -1.0, expected: 0 or more'),
    ('[{"store": "a"}, {"store": "a"}]', "data.train: store: 'a', expected: unique values"),
    ('[{"store": "a"}]', 'data.valid: [], expected: at least one validation set with data.train'),
])
def test_lists_of_objects_are_checked(command, value, error):
  assert command('--config=configs/base.py', f'--config.data.train={value}').error == error


@pytest.mark.parametrize('values, error', [
    ({'data.phases': [{'start': '5 steps', 'weights': [1, 2]}]}, 'data.phases: weights: [1.0, 2.0], expected: 1 weights'),
    ({'data.phases': [{'start': 'soon', 'weights': [1]}]}, "data.phases: start: 'soon', expected: a count of steps"),
    ({'data.phases': [{'start': 5, 'weights': [0]}]}, 'data.phases: weights: [0.0], expected: 0 or more'),
    ({'data.valid': [{'name': 'a/b', 'store': 'x'}]}, "data.valid: 'a/b', expected: names and tags of letters"),
    ({'data.valid': [{'name': 'v', 'store': 'x'}, {'name': 'valid', 'store': 'y'}]}, "data.valid: name: 'valid', expected: another"),
    ({'data.valid': [{'name': 'v', 'store': 'x', 'tags': ['a', 'a']}]}, "data.valid: tags: ['a', 'a'], expected: each tag once"),
    ({'data.source.path': 'x.txt'}, "data.source.path: 'x.txt', expected: no source together with data.train"),
    ({'data.workers': 2, 'data.prefetch': 0}, 'data.prefetch: 0, expected: 1 or more'),
    ({'data.train': [{'store': 's', 'weight': 1}, {'store': 't'}]}, 'data.train: weight: 0.0, expected: a weight above 0 for t too'),
])
def test_inconsistent_mixtures_are_errors(values, error):
  base = {'data.train': [{'store': 's'}], 'data.valid': [{'name': 'v', 'store': 'v'}]}
  with pytest.raises(UserError) as caught:
    override(Config(), base | values)
  assert str(caught.value).startswith(error)


@given(configs())
@settings(max_examples=60, deadline=None)
def test_a_config_survives_json(config):
  assert from_json(to_json(config)) == config


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
  path = tmp_path_factory.mktemp('recipes') / 'base.py'
  path.write_text('from gptjax.config import Config as get_config\n')
  return str(path)


@given(config=configs())
@settings(max_examples=60, deadline=None)
def test_every_field_takes_its_own_value_as_text(recipe, config):
  plain = lambda item: dataclasses.asdict(item) if dataclasses.is_dataclass(item) else item
  text = lambda value: json.dumps(list(map(plain, value))) if isinstance(value, tuple) else value
  args = [f'--config.{name}={text(value)}' for name, value in flatten(config).items()]
  assert outcome(f'--config={recipe}', *args).config == config


@given(config=configs())
@settings(max_examples=60, deadline=None)
def test_a_printed_line_can_be_pasted_after_config(recipe, config):
  config = override(config, {name: ''.join(filter(str.isprintable, flatten(config)[name])) for name in TEXTS})
  args = [arg for line in describe(config).splitlines()
          for arg in shlex.split(f'--config.{line.replace(" = ", "=", 1)}', comments=True)]
  assert outcome(f'--config={recipe}', *args).config == config


# The real thing: a process


def process(tmp_path, *args, main='print(config.model.layers)'):
  """Runs a program made with run()."""
  program = tmp_path / 'program.py'
  program.write_text(
      'from absl import flags\nfrom gptjax import config as configs\n'
      "flags.DEFINE_string('workdir', None, 'the folder of the run', required=True)\n"
      f"def main(config):\n  {main}\nif __name__ == '__main__':\n  configs.run(main)\n")
  (tmp_path / 'tiny.py').write_text('from gptjax.config import *\ndef get_config():\n  return Config()\n')
  return subprocess.run([sys.executable, program, *args], cwd=tmp_path, capture_output=True, text=True, check=False,
                        env={'PYTHONPATH': str(ROOT)})


@pytest.mark.parametrize('args, error', [
    (['--config=tiny.py', '--workdir=w', '--config.model.heads=3'], 'error: model.heads: 3, expected: a divisor of '),
    (['--config=tiny.py', '--workdr=w'], "error: --workdr: 'w', expected: --config, --config.FIELD, --workdir; see "),
    (['--config=tiny.py'], 'error: --workdir: None, expected: a value: the folder of the run'),
])
def test_a_process_prints_one_line_and_exits_with_2(tmp_path, args, error):
  done = process(tmp_path, *args)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith(error) and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr


def test_a_process_runs_with_absl_flags_and_without_jax(tmp_path):
  done = process(tmp_path, '--config=tiny.py', '--workdir=w', '--config.model.layers=7', '--verbosity=1',
                 main='import sys; print(config.model.layers, "jax" in sys.modules, flags.FLAGS.verbosity)')
  assert (done.returncode, done.stdout, done.stderr) == (0, '7 False 1\n', '')


def test_escapes_in_a_text_are_one_character_each():
  assert unescaped(r'a\nb\tc') == 'a\nb\tc'
  assert unescaped(r'print("\\n") \d \\\n' + '\n\\') == r'print("\n") \d ' + '\\\n\n\\'


def test_help_does_not_need_required_flags(tmp_path):
  done = process(tmp_path, '--help')
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.startswith('usage: python ') and '  --workdir ' in done.stdout
  assert '--config.model.layers=4' in done.stdout and '--verbosity' not in done.stdout


def test_a_process_with_a_bug_ends_with_a_traceback(tmp_path):
  done = process(tmp_path, '--config=tiny.py', '--workdir=w', main='raise RuntimeError("a defect")')
  assert done.returncode == 1 and 'Traceback' in done.stderr and done.stderr.endswith('RuntimeError: a defect\n')


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda path: path.stem)
def test_every_recipe_is_a_config(path):
  assert isinstance(load(str(path)), Config)
