"""Checkpoints of a run, through Orbax."""

import dataclasses
import errno
import math
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from gptjax.config import CheckpointConfig, UserError
from gptjax.model import Parameters


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a run is: what a checkpoint holds beside the arrays."""

  step: int = 0
  """updates done"""
  rows: int = 0
  """rows of data taken; the whole state of the data"""
  tokens: int = 0
  """targets seen; more than an int32 on a device could count"""


class Checkpoints:
  """The checkpoints of one folder; saving goes on in the background.

  Args:
    directory: made if missing.
    config: retention; None: for reading only.
  """

  def __init__(self, directory: Path, config: CheckpointConfig | None = None):
    self._directory = directory
    self._pending = None
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name='progress')
    context = ocp.Context()
    context.checkpointables.registry = registry
    # Random floats do not compress: without it a save needs no second copy of the state in memory.
    context.array.saving.use_compression = False
    context.pytree.loading.partial_load = config is None  # readers want the parameters alone
    self._checkpointer = ocp.training.Checkpointer(
      directory.absolute(), context=context, preservation_policy=_retention(config) if config else None,
      cleanup_tmp_directories=config is not None)

  def steps(self) -> list[int]:
    """Steps that can be restored, oldest first."""
    return sorted(c.step for c in self._checkpointer.checkpoints)

  def resolve(self, wanted: str) -> int:
    """The step that 'latest', 'best' (lowest validation loss) or a number means.

    Raises:
      UserError: there is no such checkpoint.
    """
    steps = self.steps()
    if not steps:
      raise UserError('--workdir', str(self._directory.parent), 'a folder with checkpoints, which gptjax.train makes')
    if wanted == 'latest':
      return steps[-1]
    scored = {c.step: c.metrics['loss'] for c in self._checkpointer.checkpoints if c.metrics}
    if wanted == 'best' and scored:
      return min(scored, key=scored.__getitem__)
    if wanted.isdecimal() and int(wanted) in steps:
      return int(wanted)
    best = ', best' if scored else ''
    raise UserError('--step', wanted, f'latest{best}, {", ".join(map(str, steps))}')

  def resolve_all(self, wanted: str) -> list[int]:
    """The steps, oldest first, that 'all' means, or a list such as '100,200,best'.

    Raises:
      UserError: one of them is not there.
    """
    if wanted == 'all' and (steps := self.steps()):
      return steps
    return sorted({self.resolve(one.strip()) for one in wanted.split(',')})

  def save(self, progress: Progress, state: Any, loss: float | None) -> None:
    """Starts to save; a save still running is waited for, and what went wrong with it raised here.

    Args:
      progress: stored beside the state; its step names the checkpoint.
      state: a tree of arrays.
      loss: validation loss at this step, by which the best checkpoint is kept; None: not validated.
    """
    self.wait()
    # Not a number would count as the best of all.
    metrics = {'loss': loss} if loss is not None and math.isfinite(loss) else None
    try:
      self._pending = self._checkpointer.save_checkpointables_async(
        progress.step, {'state': state, 'progress': dataclasses.asdict(progress)}, metrics=metrics, force=True)
    except Exception as error:
      raise self._explained(error) from error

  def wait(self) -> None:
    """Returns when everything saved is on disk."""
    pending, self._pending = self._pending, None
    if pending is not None:
      try:
        pending.result()
      except Exception as error:
        raise self._explained(error) from error

  def restore(self, step: int, state: Any) -> tuple[Any, Progress]:
    """Loads the checkpoint of a step into the shapes, dtypes and shardings of an abstract tree."""
    loaded = self._load(step, {'state': state, 'progress': None})
    return loaded['state'], Progress(**loaded['progress'])

  def restore_parameters(self, step: int, parameters: dict[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Loads only the parameters of a TrainState, and neither reads nor allocates its optimizer state."""
    loaded = self._load(step, {'state': {'parameters': parameters}})['state']['parameters']
    for name, value in loaded.items():
      if isinstance(value, jax.ShapeDtypeStruct):  # Orbax leaves what it did not find as it was asked for
        raise self._unfit(step, f'it has no {name}')
    return loaded

  def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    try:
      return self._checkpointer.load_checkpointables(step, wanted)
    except Exception as error:
      # Orbax wraps every failure in one about handlers; the cause is what a person can act on.
      reason = ' '.join(str(error.__cause__ or error).split())[:300]
      raise self._unfit(step, reason) from error

  def _unfit(self, step: int, reason: str) -> UserError:
    return UserError('checkpoint', str(self._directory / str(step)), f'a checkpoint that fits this config; {reason}')

  def close(self) -> None:
    """Waits and lets go of the folder."""
    try:
      self.wait()
    finally:
      try:
        self._checkpointer.close()
      except Exception as error:  # Orbax tells a failed save once more
        raise self._explained(error) from error

  def _explained(self, error: Exception) -> Exception:
    full = getattr(error, 'errno', None) == errno.ENOSPC or 'RESOURCE_EXHAUSTED' in str(error)
    return UserError('checkpoint', str(self._directory), 'a disk with space left') if full else error


def _retention(config: CheckpointConfig):
  policies = ocp.training.preservation_policies
  kept = [policies.LatestN(config.keep)]
  if config.keep_best:
    kept.append(policies.BestN(get_metric_fn=lambda metrics: metrics['loss'], reverse=True, n=1,
                               keep_checkpoints_without_metrics=False))
  return policies.AnyPreservationPolicy(kept)
