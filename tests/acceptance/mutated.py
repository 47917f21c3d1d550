"""Configs that people get wrong: one to four fields of a good one changed, on a command line, in a recipe or in a run's config.json."""

import contextlib
import dataclasses
import json
import math
import random
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from hypothesis import strategies as st

from gptjax import config as configs
from gptjax.config import Config, Duration
from gptjax.config.fields import FIELDS, choices
from tests.acceptance import in_process

_RECIPE = '''
import dataclasses
import numpy as np
from gptjax.config import *

nan, inf = float('nan'), float('inf')


def put(group, name, value):
  head, _, rest = name.partition('.')
  return dataclasses.replace(group, **{head: put(getattr(group, head), rest, value) if rest else value})


def get_config():
  config = Config(
    model=ModelConfig(layers=1, heads=2, width=16),
    data=DataConfig(source=SourceConfig('text.txt'), context=16, tokenizer=TokenizerConfig(kind='chars')),
    optimizer=OptimizerConfig(warmup=1), mesh=MeshConfig(data=1), eval=EvalConfig(every=1, rows=4, sample_tokens=0), steps=2, batch_size=4)
'''
_WORDS = 'a lazy dog and the quick brown fox jump over old warm stoves while small cats sleep'.split()

# Nothing here names a place outside the folder that fuzzing runs in but such as have no documents: a good path is read, however large.
_NUMBERS = ['-1', '0', '1', '2', '3', '4', '5', '7', '8', '16', '64', '255', '1000', '-0.0', '0.5', '1.0', '1e9', '1_000', '1e-320',
            '1e30', '1e308', '1e400', '9' * 50, '9' * 5000,
            *(str(2**power + more) for power in (16, 31, 32, 63, 64) for more in (-1, 0))]
_DURATIONS = ['1.5e6 tokens', '1e9 tokens', '3 epochs', '0 steps', '1e308 epochs', '2 steps', '1e-5 tokens', '1e30 steps', 'tokens',
              '3 hours', '1.5', '--1', '9' * 400 + ' epochs']
_PATHS = ['nowhere/text.txt', 'text.txt', 'empty', 'empty/a.txt', 'binary.bin', 'run', 'run/data/tokenizer', 'recipe.py', '/dev',
          '/dev/null', 'text.txt/x', 'nosuch://x', '*.txt', '[', 'x' * 300, '~nobody_of_this_name/x']
_WORDS_IN_VAIN = [' ', 'nan', 'inf', '-inf', 'true', 'false', 'None', 'null', 'ä', '名前', '\u202e\u0007', 'a\nb', 'error: x', '\udcff',
                  'x' * 100_000, '🙂' * 50]
DEEP = '[' * 100_000 + ']' * 100_000
_JSON = ['[]', '{}', '[1]', '["a"]', '[[[', DEEP, '[NaN]', '[1e400]', '{"store": 1}', '["attention", "hidden"]', '["hidden", "hidden"]',
         '[{"store": "nowhere"}]', '[{"store": "text.txt"}]', '[{"store": "run/data/valid/valid"}]', '[{"store": "a", "weight": -1}]',
         '[{"store": "a", "weight": NaN}]', '[{"name": "a b", "store": "x"}]', '[{"name": "v", "store": "run/data/valid/valid"}]',
         '[{"name": "v", "store": 3}]', '[{"start": "1 tokens", "weights": [1]}]', '[{"start": 1, "weights": []}]',
         '[{"start": 1, "weights": "a"}]', '[{"store": "run/data/valid/valid", "epochs": 1e308}]', '[{"stroe": "a"}]']
_CODE = ['None', 'True', 'nan', 'inf', '-inf', '-1', '0', '1.5', '10**30', '10**400', '10**5000', '2**63', '1 + 2j', "'4'", "b'4'", "''",
         "'\\0'", "'\\ud800'", "'x' * 10**6", '[]', '{}', '()', '(1,)', '[1]', '{1}', 'range(3)', 'object()', 'print', 'int',
         'np.int64(4)', 'np.float32(1)', 'np.float64("nan")', 'np.array([1, 2])', 'np.array([])', 'ModelConfig()', 'ModelConfig',
         'Config()', "Component('text.txt')", "(Component('run/data/valid/valid'),)", "[Component('a', float('nan'))]",
         "(ValidationSet('v', 'run/data/valid/valid'),)", "(Phase('1 tokens', (1.0,)),)", "(Phase(1, ()),)", '1 / 0', 'undefined', '*']
_NAMES = ['', '.', 'x', 'model', 'data.source', 'model.layer', 'model.layers.x', 'lr', 'kv_heads', 'ModelConfig', 'model..layers',
          ' seed', 'größe', 'x' * 10_000, '__class__', 'data.train.store']
_GONE = 'GONE'


@dataclasses.dataclass(frozen=True)
class Mutated:
  """Changes of a good config, each a field and what is written for it."""

  way: Literal['flags', 'recipe', 'json']
  changes: tuple[tuple[str, str], ...]

  def __str__(self) -> str:
    return f'{self.way}: ' + ', '.join(f'{name}={text}' if len(text) < 200 else f'{name}={text[:50]}... ({len(text)} characters)'
                                       for name, text in self.changes)


def _plausible(hint: Any) -> st.SearchStrategy[str]:
  """What a field's type accepts, as the text of a flag: good values meet others here that they do not go with."""
  if choices(hint):
    return st.sampled_from([*map(str, choices(hint))])
  if hint is int:
    return st.sampled_from(['0', '1', '2', '3', '4', '6', '8', '12', '16', '32', '1000', str(2**31 - 1)])
  if hint is float:
    return st.sampled_from(['0', '1e-9', '0.1', '0.5', '1', '4', '1e4', '1e30', '1e308'])
  if hint is bool:
    return st.sampled_from(['true', 'false'])
  if hint == Duration:
    return st.sampled_from(['0', '1', '2', '3', *_DURATIONS[:6]])
  return st.sampled_from(_PATHS if hint is str else _JSON)


_ANY = st.one_of(
  *map(st.sampled_from, (_NUMBERS, _DURATIONS, _PATHS, _WORDS_IN_VAIN, _JSON)),
  st.text(st.characters(codec='utf-8', exclude_characters='./~:\0'), max_size=20), st.integers(-2**70, 2**70).map(str),
  st.floats().map(repr))


@st.composite
def mutated(draw: st.DrawFn) -> Mutated:
  """Mutated configs of all ways."""
  way = draw(st.sampled_from(['flags', 'recipe', 'json']))
  names = draw(st.lists(st.sampled_from(list(FIELDS)), min_size=1, max_size=4, unique=True))
  if draw(st.integers(0, 9)) == 9:
    names[-1] = draw(st.sampled_from(_NAMES))
  changes, fitting = [], draw(st.booleans())  # or else one bad value hides what good ones do together
  for name in names:
    text = draw(_plausible(FIELDS.get(name)) if fitting or draw(st.booleans()) else _ANY)
    if way == 'recipe':
      text = draw(st.sampled_from(_CODE)) if not fitting and draw(st.booleans()) else repr(_value(name, text))
    elif way == 'json':
      text = draw(st.sampled_from([_GONE, 'null', '1', '-1', '"x"', 'NaN', '{"layers": 1}', '"\\u0000"', '"\\ud800"', *_JSON])) if (
        not fitting and draw(st.booleans())) else json.dumps(_value(name, text))
    # The empty path is the embedded corpus, which takes a minute: not what is asked here.
    changes.append((name, 'text.txt' if name == 'data.source.path' and text in ('', "''", '""') else text))
  return Mutated(way, tuple(changes))


def _value(name: str, text: str) -> object:
  """A flag's text as the value of a field, where it is one."""
  hint = FIELDS.get(name)
  for read in (int, float) if hint in (int, float, Duration) else ():
    with contextlib.suppress(ValueError):
      return read(text)
  if hint is bool and text in ('true', 'false'):
    return text == 'true'
  if typing.get_origin(hint) is tuple:
    with contextlib.suppress(ValueError, RecursionError):
      return json.loads(text)
  return text


class Configs:
  """Runs mutated configs.

  Args:
    folder: to work in, the current one; it gets a text, a recipe and a finished run.
    cache: of compiled programs and data.
    seconds: that a command may take.
  """

  def __init__(self, folder: Path, cache: Path, seconds: float):
    self._folder, self._seconds = folder, seconds
    self._flags = (f'--cache_dir={cache}', '--stop_at=2', '--log_every=1')
    write_text(folder / 'text.txt')
    (folder / 'recipe.py').write_text(_RECIPE + '  return config\n')
    (folder / 'empty').mkdir()
    (folder / 'empty/a.txt').touch()
    (folder / 'binary.bin').write_bytes(bytes(range(256)) * 10)
    self.ran = 0
    """configs that were good, and trained or loaded"""
    done = in_process.run('gptjax.train', '--config=recipe.py', '--workdir=run', *self._flags, seconds=600)
    assert not done.status, done
    self._config = (folder / 'run/config.json').read_bytes()

  def wrong(self, case: Mutated) -> str:
    """What is wrong with the exit of a command with this config; '' if nothing is."""
    with cheap_alone():
      return self._json(case) if case.way == 'json' else self._train(case)

  def _train(self, case: Mutated) -> str:
    recipe, flags = 'recipe.py', [f'--config.{name}={text}' for name, text in case.changes]
    if case.way == 'recipe':
      recipe, flags = 'mutated.py', []
      lines = ''.join(f'  config = put(config, {name!r}, {text})\n' for name, text in case.changes)
      (self._folder / recipe).write_text(_RECIPE + lines + '  return config\n')
    command = ('gptjax.train', f'--config={recipe}', '--workdir=new', *self._flags, *flags)
    done = in_process.run(*command, seconds=self._seconds)
    if done.noisy:
      remove(self._folder / 'new')
      done = in_process.alone(*command, seconds=self._seconds)
    self.ran += done.status == 0
    workdir = self._folder / 'new'
    left = [str(path.relative_to(workdir)) for path in workdir.rglob('*')] if done.status == 2 and not done.out else []
    remove(workdir)
    return done.wrong or (f'leaves {left[:5]} after {done.err}' if left else '')

  def _json(self, case: Mutated) -> str:
    """A run whose config.json says something else is evaluated; and as it was it must be good again."""
    file = self._folder / 'run/config.json'
    tree = json.loads(self._config)
    for name, text in case.changes:
      _put(tree, name, text)
    file.write_text(json.dumps(tree).replace('"DEEP"', DEEP))
    try:
      done = in_process.run('gptjax.evaluate', '--workdir=run', self._flags[0], seconds=self._seconds)
    finally:
      file.write_bytes(self._config)
    self.ran += done.status == 0
    return done.wrong


def _put(tree: dict[str, Any], name: str, text: str) -> None:
  head, _, rest = name.partition('.')
  if rest and isinstance(tree.get(head), dict):
    _put(tree[head], rest, text)
  elif text == _GONE:
    tree.pop(head, None)
  else:
    try:
      tree[head] = json.loads(text)
    except RecursionError:
      tree[head] = 'DEEP'
    except ValueError:
      tree[head] = text


def write_text(path: Path, sentences: int = 300) -> None:
  """Writes sentences of small words, a line each."""
  rng = random.Random(0)
  path.write_text(''.join(' '.join(rng.choices(_WORDS, k=8)) + '.\n' for _ in range(sentences)))


def remove(folder: Path) -> None:
  """Removes a folder, if it is there."""
  if folder.exists():
    shutil.rmtree(folder)


@contextlib.contextmanager
def cheap_alone() -> Iterator[None]:
  """Within the context, valid but large configs are only resolved, since their runs would need more memory than this machine has.

  All errors of configs are reported by then. The peak FLOP/s are a constant, since measuring them takes a second.
  """
  from gptjax import checkpoint, training
  train, restorer = training.train, checkpoint.Restorer

  def resolved(config: Config, options: training.Options) -> None:
    if cheap(config):
      train(config, options)
    else:
      resolve(config, options.cache_dir)

  class Cheap(restorer):  # type: ignore[misc, valid-type]

    def __init__(self, workdir: Path, model_axis: int = 0):
      config = configs.read_config(workdir)
      if not cheap(config):
        raise configs.UserError('config.json', 'too large', 'what is fuzzed')
      super().__init__(workdir, model_axis)

  with mock.patch.object(training, 'train', resolved), mock.patch.object(checkpoint, 'Restorer', Cheap):
    yield


def resolve(config: Config, cache: Path) -> None:
  """What training does before it allocates anything."""
  import jax

  from gptjax.data import prepare
  from gptjax.sharding import make_mesh
  from gptjax.training.run import resolve
  data, mesh = prepare(config.data, cache), make_mesh(config.mesh)
  if config.model.layers > 6:  # stacked, a thousand cost as one
    config = configs.override(config, {'compute.scan': True})
  with jax.set_mesh(mesh):
    resolve(config, data, mesh)


def cheap(config: Config) -> bool:
  """Whether two steps of it take seconds and megabytes."""
  model, context = config.model, config.data.context
  rows = math.ceil(max(model.vocab_size, 300) / model.vocab_multiple) * model.vocab_multiple
  per_layer = model.width * (2 * model.head_width * (model.heads + model.key_heads) + 3 * model.hidden_width)
  parameters = model.layers * per_layer + (2 * rows + context) * model.width
  per_token = model.layers * (8 * model.width + 3 * model.hidden_width + model.heads * (context + 4 * model.head_width)) + rows
  return (parameters < 2e6 and config.batch_size * context < 2**14 and config.microbatch_size * context * per_token < 5e7
          and model.layers <= 6 and config.eval.sample_tokens <= 32 and config.data.prefetch <= 64 and not config.data.workers)
