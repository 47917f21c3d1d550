"""Inspects checkpoints: python -m tools.inspect_checkpoint --workdir=DIR [--step=STEP [--against=STEP or FOLDER]] [--match=TEXT]

Without --step it lists and verifies them: step, tokens, validation loss, size, time and state. With --step it lists the tensors of one:
shape, type, norm, smallest and largest value. With --against it compares each tensor with the one of the same name in another checkpoint;
the exit status is 1 if they differ.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from absl import flags, logging
from rich.console import Console
from rich.table import Column, Table

from gptjax import config as configs
from gptjax.config import UserError
from gptjax.data import progress
from gptjax.files import expanded

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_STEP = flags.DEFINE_string('step', None, 'latest, best or a number: list the tensors of that checkpoint')
_AGAINST = flags.DEFINE_string('against', None, 'another step of the run, another workdir (its newest) or a folder checkpoints/STEP')
_MATCH = flags.DEFINE_string('match', '', 'only tensors whose name contains this, such as trained/')


def main(_) -> int:
  logging.set_verbosity(logging.FATAL)  # Orbax's; failures are raised as well
  import jax
  jax.config.update('jax_platforms', 'cpu')  # leaves the accelerators to training
  from gptjax.checkpoint import Checkpoints
  workdir = expanded(_WORKDIR.value, '--workdir')
  checkpoints = Checkpoints(workdir / 'checkpoints')
  console = progress.console()
  if _STEP.value is None:
    if _AGAINST.value:
      raise UserError('--step', None, 'the step to compare with --against')
    return _list(console, workdir, checkpoints)
  folder = workdir / 'checkpoints' / str(checkpoints.resolve(_STEP.value))
  if _AGAINST.value is None:
    _describe(console, folder)
    return 0
  return _compare(console, folder, _other(workdir, _AGAINST.value))


def _list(console: Console, workdir: Path, checkpoints) -> int:
  from gptjax.checkpoint import DAMAGED
  from gptjax.checkpoint.manifest import MANIFEST, read_manifest, verify
  steps = checkpoints.steps()
  if not steps:
    raise UserError('--workdir', str(workdir), 'a folder with checkpoints, written by gptjax.train')
  table = Table('step', 'tokens', 'loss', 'MB', 'saved', Column('state', overflow='fold'))
  bad = False
  for step in steps:
    folder = workdir / 'checkpoints' / str(step)
    if wrong := verify(folder):
      if step not in checkpoints.steps():  # removed by its run meanwhile
        continue
      bad = True
      table.add_row(str(step), '', '', '', '', f'damaged: {wrong}')
      continue
    facts, files = (read_manifest(folder)[name] for name in ('facts', 'files'))
    size = sum(size for size, _ in files.values()) + (folder / MANIFEST).stat().st_size
    loss = '' if facts['loss'] is None else f'{facts["loss"]:.4f}'
    table.add_row(str(step), f'{facts["progress"]["tokens"]:,}', loss, f'{size / 1e6:,.1f}', facts['saved'], 'intact')
  console.print(table)
  damaged = sorted(path.name for path in (workdir / DAMAGED).iterdir()) if (workdir / DAMAGED).exists() else []
  if damaged:
    console.print(f'damaged, moved to {workdir / DAMAGED}: {", ".join(damaged)}')
  return int(bad)


def _describe(console: Console, folder: Path) -> None:
  from gptjax.checkpoint import Contents
  contents = Contents(folder)
  names = _chosen(contents.shapes)
  table = Table(Column('tensor', overflow='fold'), 'shape', 'type', 'norm', 'smallest', 'largest')
  count = 0
  for name, value in contents.read(names):
    value64 = value.astype(np.float64)
    table.add_row(name, ' x '.join(map(str, value.shape)) or 'scalar', str(value.dtype), f'{np.linalg.norm(value64):.6g}',
                  f'{value64.min():.4g}', f'{value64.max():.4g}')
    count += value.size
  console.print(table)
  console.print(f'{folder}: {len(names)} tensors, {count:,} values')


def _compare(console: Console, folder: Path, other: Path) -> int:
  from gptjax.checkpoint import Contents
  one, two = Contents(folder), Contents(other)
  names = _chosen({**one.shapes, **two.shapes})
  table = Table(Column('tensor', overflow='fold'), 'difference', 'relative')
  comparable = [name for name in names if name in one.shapes and name in two.shapes and one.shapes[name].shape == two.shapes[name].shape]
  different = 0
  for name in names:
    if name not in comparable:
      shapes = [list(found.shapes[name].shape) if name in found.shapes else 'missing' for found in (one, two)]
      table.add_row(name, f'{shapes[0]} and {shapes[1]}', '')
      different += 1
  for (name, a), (_, b) in zip(one.read(comparable), two.read(comparable)):
    if a.tobytes() != b.tobytes():
      away = a.astype(np.float64) - b.astype(np.float64)
      norm = np.linalg.norm(a.astype(np.float64))
      table.add_row(name, f'at most {np.abs(away).max():.4g}', f'{np.linalg.norm(away) / norm:.2e}' if norm else '')
      different += 1
  if different:
    console.print(table)
  console.print(f'{folder} and {other}: {len(names) - different} of {len(names)} tensors bitwise equal')
  return int(different > 0)


def _chosen(names: Iterable[str]) -> list[str]:
  chosen = sorted(name for name in names if _MATCH.value in name)
  if not chosen:
    raise UserError('--match', _MATCH.value, 'a part of the name of a tensor', list(names))
  return chosen


def _other(workdir: Path, text: str) -> Path:
  from gptjax.checkpoint import Checkpoints
  path = expanded(text)
  if path.is_dir() and path.name.isdecimal() and path.parent.name == 'checkpoints':
    return path
  home, step = (path, 'latest') if path.is_dir() else (workdir, text)
  return home / 'checkpoints' / str(Checkpoints(home / 'checkpoints').resolve(step))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
