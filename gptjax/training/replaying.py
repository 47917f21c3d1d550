"""Replaying: repeats steps of a run from a checkpoint, to compare their metrics with the logged ones."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax

from gptjax.checkpoint import Checkpoints, Progress
from gptjax.checkpoint.arrays import FOLDERS
from gptjax.checkpoint.manifest import verify
from gptjax.config import Config, UserError, read_config
from gptjax.data import prepare
from gptjax.data.progress import announce
from gptjax.files import complete_lines, json_line, read_json
from gptjax.sharding import make_mesh
from gptjax.training.batches import source_of
from gptjax.training.guard import BadSteps
from gptjax.training.reference import add_references
from gptjax.training.rewards import make_rewards
from gptjax.training.run import Steps, resolve
from gptjax.training.workdir import initial_state, restore

CLOCK = ('tokens_per_second', 'mfu', 'data_wait')
"""Fields of metrics.jsonl that depend on the clock."""


@dataclasses.dataclass(frozen=True)
class Replayed:
  """A logged step and its repetition."""

  step: int
  logged: dict[str, float | int | None]
  again: dict[str, float | int | None]

  @property
  def differences(self) -> dict[str, float]:
    """The relative difference of each logged field; 0: bitwise equal, infinite: only one is a number."""
    return {name: _difference(value, self.again.get(name)) for name, value in self.logged.items()}

  @property
  def difference(self) -> float:
    """The largest of them."""
    return max(self.differences.values())


def replay(workdir: Path, step: int, cache_dir: Path, reward_file: Path | None = None) -> Iterator[Replayed]:
  """Repeats the steps of a run from the newest checkpoint before a step up to it, and yields those that were logged.

  Nothing is written in the workdir. Raises a UserError if the step was not logged, or the data of the run has changed.
  """
  logged = _logged(workdir / 'metrics.jsonl')
  if step not in logged:
    nearest = sorted(sorted(logged, key=lambda one: abs(one - step))[:5])
    raise UserError('--step', step, f'a logged step: {", ".join(map(str, nearest)) or "none was logged"}')
  checkpoints = Checkpoints(workdir / 'checkpoints')
  before = checkpoints.newest(below=step)
  config = _config_at(workdir, checkpoints, step)
  if before is None and config.init_from:
    raise UserError('--step', step, 'a step after the oldest checkpoint: the first, with the weights of init_from, was removed')
  data = prepare(config.data, cache_dir)
  if (was := read_json(workdir / 'data' / 'identity.json').get('fingerprint')) != data.fingerprint:
    raise UserError('data', data.fingerprint, f'{was}, the fingerprint of the documents, split and tokenizer of the run')
  mesh = make_mesh(config.mesh)
  with jax.set_mesh(mesh):
    run = resolve(config, data, mesh)
    add_references(run, workdir)
    if before is None:
      state, progress, words = initial_state(run, data.tokenizer)[0], Progress(), 'the start: no checkpoint before it is left'
    else:
      state, progress, words = *restore(checkpoints, before, run), f'checkpoint {before}'
    announce(f'from {words}, {step - progress.step} steps')
    source = source_of(run, data, workdir, make_rewards(config.objective.rewards, reward_file), writes=False)
    bad_steps = BadSteps(config.faults, workdir, writes=True)
    steps, tokens = Steps(run, source, bad_steps, state, progress), progress.tokens
    del state  # the first step reuses its memory
    with contextlib.closing(steps):
      while steps.step < step:
        number, _, _, metrics = steps.dispatch()
        found = jax.device_get(metrics)
        tokens += 0 if found.pop('bad') else int(found.pop('targets'))
        if number in logged:
          values = {name: float(value) for name, value in found.items() if name != 'targets'} | {'tokens': tokens}
          yield Replayed(number, logged[number], json.loads(json_line(values)))


def _config_at(workdir: Path, checkpoints: Checkpoints, step: int) -> Config:
  """The config of a step, which is that of the first checkpoint at or after it, but with the mesh and data of the workdir."""
  now, folders = read_config(workdir), [checkpoints.folder(one) for one in checkpoints.steps() if one >= step]
  then = next((read_config(folder) for folder in folders if not verify(folder, unread=FOLDERS)), now)
  return dataclasses.replace(then, mesh=now.mesh, zero_stage=now.zero_stage, data=now.data)


def _logged(file: Path) -> dict[int, dict[str, float | int | None]]:
  """The fields of each logged step that do not depend on the clock."""
  lines = [json.loads(line) for line in complete_lines(file)]
  return {line.pop('step'): {name: value for name, value in line.items() if name not in CLOCK} for line in lines if 'loss' in line}


def _difference(one: float | int | None, other: float | int | None) -> float:
  if one == other:
    return 0.0
  if one is None or other is None:
    return float('inf')
  return abs(one - other) / max(abs(one), abs(other))
