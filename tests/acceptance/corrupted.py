"""Corrupted files: one file of a finished run or of its stores is corrupted, and the commands that read it are run."""

import dataclasses
import json
import random

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st

from tests.acceptance import in_process
from tests.acceptance.mutated import DEEP, cheap_alone, remove, write_text

_RECIPE = '''
from gptjax.config import *


def get_config():
  return Config(
    model=ModelConfig(layers=1, heads=2, width=16),
    data=DataConfig(train=(Component('stores/train'),), valid=(ValidationSet('lines', 'stores/valid', ('all',)),), context=16),
    optimizer=OptimizerConfig(warmup=2), mesh=MeshConfig(data=1), eval=EvalConfig(every=2, rows=4, sample_tokens=4), steps=6,
    checkpoint=CheckpointConfig(every=2), batch_size=4)
'''
_COMMANDS: dict[str, tuple[str, ...]] = {
  'train': ('gptjax.train', '--config=recipe.py', '--log_every=1'), 'evaluate': ('gptjax.evaluate',),
  'generate': ('gptjax.generate', '--prompt=the', '--max_tokens=4'), 'report': ('tools.report',)}
_SHAPES = ['null', 'true', '3', '-1', '"x"', '[]', '[1]', '{}', '{"version": 2}', '{"step": "x"}', '{"step": null}', '[[]]', 'NaN', '1e999',
           '9' * 5000, DEEP, '{"a": 1}\n{"a": 1}', '\n', '\n\n[]\n', '{"step": 1}\n3\n']
_VALUES: list[Any] = [None, True, -1, 0, 2**70, 0.5, float('nan'), '', 'x', '\0', '../..', [], [1], {}, {'a': 1}]

Files = dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class Corruption:
  """A change of a file, and the command that then reads it."""

  file: str
  how: Literal['truncated', 'flipped', 'emptied', 'deleted', 'random', 'shape', 'value']
  at: int
  """which byte, shape or value"""
  command: str

  def __str__(self) -> str:
    return f'{self.file} {self.how} ({self.at}), {self.command}'

  def apply(self, path: Path) -> None:
    """Corrupts the file."""
    data = path.read_bytes()
    match self.how:
      case 'truncated':
        path.write_bytes(data[:self.at % max(len(data), 1)])
      case 'flipped':
        place = self.at // 8 % max(len(data), 1)
        path.write_bytes(data[:place] + bytes(byte ^ 1 << self.at % 8 for byte in data[place:place + 1]) + data[place + 1:])
      case 'emptied':
        path.write_bytes(b'')
      case 'deleted':
        path.unlink()
      case 'random':
        path.write_bytes(random.Random(self.at).randbytes(self.at % 300))
      case 'shape':
        path.write_text(_SHAPES[self.at % len(_SHAPES)])
      case 'value':
        path.write_text(_with_another_value(data.decode(errors='replace'), self.at))


def _with_another_value(text: str, at: int) -> str:
  """JSON, or a line of it, with one of its values replaced; text that is none stays as it is, but for its end."""
  lines = text.splitlines(keepends=True) if text.count('\n{') else [text]
  for index in range(len(lines)):
    try:
      tree = json.loads(lines[(at + index) % len(lines)])
    except ValueError:
      continue
    places = list(_places(tree))
    if places:
      group, key = places[at % len(places)]
      group[key] = _VALUES[at // 7 % len(_VALUES)]
      lines[(at + index) % len(lines)] = json.dumps(tree) + '\n'
      return ''.join(lines)
  return text[:-1]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
  for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
    yield tree, key
    yield from _places(value)


def _without_clock(lines: bytes) -> bytes:
  from gptjax.training.replaying import CLOCK
  records = [json.loads(line) for line in lines.splitlines()]
  return b''.join(json.dumps({name: value for name, value in one.items() if name not in CLOCK}).encode() + b'\n' for one in records)


def read(folder: Path) -> Files:
  """All files below a folder."""
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


class Corruptions:
  """Corrupts files of a run, one at a time.

  Args:
    folder: to work in, the current one; it gets a text, stores, a tokenizer and a run.
    cache: of compiled programs.
    seconds: that a command may take.
  """

  def __init__(self, folder: Path, cache: Path, seconds: float):
    self._folder, self._cache, self._seconds = folder, cache, seconds
    write_text(folder / 'text.txt')
    (folder / 'recipe.py').write_text(_RECIPE)
    source = ('--source=text.txt', r'--separator=\n')
    self._do('tools.train_tokenizer', *source, '--vocab_size=300', '--out=tokenizer')
    for side in ('train', 'valid'):
      self._do('tools.prepare_data', *source, '--tokenizer=tokenizer', '--valid_fraction=0.2', '--processes=1', f'--side={side}',
               f'--out=stores/{side}')
    with cheap_alone():
      self._do(*_COMMANDS['train'], '--workdir=run', '--stop_at=4', f'--cache_dir={cache}')
      self._do('gptjax.evaluate', '--workdir=run', f'--cache_dir={cache}')
      self._good = {name: read(folder / name) for name in ('run', 'stores')}
      self.parameters = self._parameters()
      self._do(*_COMMANDS['train'], '--workdir=run', f'--cache_dir={cache}')
      self.parameters |= self._parameters()
      self._put_back()
    self.refused = 0
    """corruptions that a command reported"""

  def _do(self, module: str, *args: str) -> None:
    # Tools have flags of names that binaries have for something else.
    run = in_process.alone if module.startswith('tools.') else in_process.run
    done = run(module, *args, seconds=600)
    assert done.status == 0 and not done.wrong, (module, args, done)

  def strategy(self) -> st.SearchStrategy[Corruption]:
    """Corruptions of all files except arrays, with equal probability for each kind of file."""
    names = [f'{top}/{name}' for top, files in self._good.items() for name in files]
    checkpoints = [name for name in names if name.startswith('run/checkpoints/') and 'ocdbt' not in name and '/d/' not in name]
    data = [name for name in names if name.startswith('run/data/')]
    train = [name for name in names if name.startswith('stores/train/')]
    own = [name for name in names if name.startswith('run/') and name.count('/') == 1]
    how = st.sampled_from(['truncated', 'flipped', 'emptied', 'deleted', 'random', 'shape', 'value'])
    at = st.integers(0, 2**20)
    of = lambda files, commands: st.builds(Corruption, st.sampled_from(files), how, at, st.sampled_from(commands))
    return st.one_of(of(own, [*_COMMANDS]), of(data, [*_COMMANDS]), of(train, ['train']),
                     of(checkpoints, ['train', 'evaluate', 'generate']))

  def wrong(self, corruption: Corruption) -> str:
    """What is wrong with the exit of the command or the files that it leaves; '' if nothing is."""
    path = self._folder / corruption.file
    whole = path.read_bytes()
    corruption.apply(path)
    before = read(self._folder / 'run')
    try:
      with cheap_alone():
        module, *flags = _COMMANDS[corruption.command]
        cache = [f'--cache_dir={self._cache}'] * (module != 'tools.report')
        command = (module, '--workdir=run', *flags, *cache)
        done = in_process.run(*command, seconds=self._seconds)
        if done.noisy:
          self._put_back()
          corruption.apply(path)
          done = in_process.alone(*command, seconds=self._seconds)
        self.refused += done.status == 2
        if done.wrong:
          return done.wrong
        if touched := self._touched(corruption, before, done.status == 2):
          return f'{touched} is another after status {done.status}: {done.err[-300:]}'
        if path.parent.exists() and not (self._folder / 'run' / 'damaged').exists():  # or else the checkpoint was set aside, and made anew
          path.write_bytes(whole)
        return self._restored()
    finally:
      self._put_back()

  def _touched(self, corruption: Corruption, before: Files, refused: bool) -> str:
    """A file that the command should have left alone."""
    after = read(self._folder / 'run')
    writes = ['evaluation.json', 'report.html', 'tensorboard/', 'checkpoints/']
    if corruption.command == 'train':  # it may have run for some steps before it read the file
      writes += ['lock', 'run.json'] if refused else ['lock', 'run.json', 'config.json', 'data/']
    # A run that goes back to the checkpoint before writes its lines again: the same, but for the clock's.
    kept = lambda name, data: _without_clock(data) if name == 'metrics.jsonl' else data
    for name, data in before.items():
      if name.startswith(tuple(writes)) or f'run/{name}' == corruption.file:
        continue
      if not kept(name, after.get(name, b'')).startswith(kept(name, data)):
        return name
    return next((name for name in after if name.endswith(('.partial', '.building'))), '')

  def _restored(self) -> str:
    found = self._parameters()
    if not found:
      return 'no checkpoint is left'
    for step, ours in found.items():
      for name, value in ours.items():
        if value.tobytes() != self.parameters[step][name].tobytes():
          return f'step {step} is restored with another {name}'
    return ''

  def _parameters(self) -> dict[int, dict[str, np.ndarray]]:
    """Parameters of each checkpoint of the run that can be restored."""
    from gptjax.checkpoint import Restorer
    restorer = Restorer(self._folder / 'run')
    steps = restorer.checkpoints.steps()
    return {step: {name: np.asarray(value) for name, value in restorer.restore(step).parameters.items()} for step in steps}

  def _put_back(self) -> None:
    for top, files in self._good.items():
      remove(self._folder / top)
      for name, data in files.items():
        path = self._folder / top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
