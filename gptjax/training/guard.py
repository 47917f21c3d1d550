"""Bad steps: how the compiled step finds one, and what the run then does."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptjax.config import Fault, FaultsConfig, UserError
from gptjax.files import Lines, complete_lines, json_line, write_atomic
from gptjax.distributed import broadcast

DECAY = 0.99
"""of the running mean and deviation, per good step"""
WARMUP = 50
"""good steps before anything counts as a spike"""
BAD_STEPS = 'bad_steps.jsonl'
MAX_CONSECUTIVE = 100
"""bad steps that are skipped; statistics stand still meanwhile, so after so many none would be good again"""


class LossStatistics(NamedTuple):
  """Running statistics of loss and gradient norm over good steps."""

  steps: Int[Array, '']
  mean: Float[Array, '2']
  variance: Float[Array, '2']


def initial_statistics() -> LossStatistics:
  """Of no step."""
  return LossStatistics(jnp.zeros((), jnp.int32), jnp.zeros(2), jnp.zeros(2))


def is_good_step(statistics: LossStatistics, loss: Float[Array, ''], grad_norm: Float[Array, ''],
                 spike: float) -> tuple[Bool[Array, ''], LossStatistics]:
  """Whether a step is good, and the statistics after it, which a bad one leaves as they were.

  Args:
    statistics: of the steps before.
    loss, grad_norm: of this step.
    spike: running deviations above the running mean from which on a step is bad; 0: only one that is not finite is.
  """
  values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
  good = jnp.all(jnp.isfinite(values))
  away = values - statistics.mean
  if spike:
    good &= (statistics.steps < WARMUP) | jnp.all(away <= spike * jnp.sqrt(statistics.variance))
  # The first steps weigh alike, as in a plain mean.
  weight = jnp.maximum(1 - DECAY, 1 / (statistics.steps + 1))
  new = LossStatistics(statistics.steps + 1, statistics.mean + weight * away, (1 - weight) * (statistics.variance + weight * away**2))
  return good, select(good, new, statistics)


def select(good: Bool[Array, ''], new: Any, old: Any) -> Any:
  """One tree of arrays or the other."""
  return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)


@dataclasses.dataclass(frozen=True)
class BadStep:
  """A step whose update was not made."""

  step: int
  rows: tuple[int, int]
  """first row of its batch, and the one after its last"""
  loss: float
  grad_norm: float
  action: str
  """what was done: FaultsConfig.bad_step"""

  def __str__(self) -> str:
    finite = bool(np.isfinite([self.loss, self.grad_norm]).all())
    return (f'step {self.step} is bad: loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}'
            f'{", a spike" if finite else ""}; rows {self.rows[0]:,} to {self.rows[1] - 1:,}')


class Rollback(Exception):
  """Raised where the run has to go back to its last checkpoint; the text says why."""


class BadSteps:
  """What a run knows of its bad steps, in bad_steps.jsonl of its workdir.

  Args:
    config: what to do.
    workdir: of the run.
    writes: whether this process reads and writes the file, for all.
  """

  def __init__(self, config: FaultsConfig, workdir: Path, writes: bool):
    self._config, self._file, self._writes = config, workdir / BAD_STEPS, writes
    self._lines = Lines(self._file)
    self._last, self._in_a_row = 0, 0
    self.found = _read(self._file) if writes else []
    # Every process passes over the same rows, whatever its file system shows it of the file.
    self._passed = [tuple(rows) for rows in broadcast('bad steps', sorted(bad.rows for bad in self.found if bad.action == 'rollback'))]

  def next_row(self, first: int, size: int) -> int:
    """The row from which on a batch of `size` rows touches no batch that was passed over, at or after row `first`."""
    for begin, end in self._passed:
      if first < end and begin < first + size:
        first = end
    return first

  def excluded_after(self, row: int) -> int:
    """Rows that are passed over from a row on."""
    return sum(end - max(begin, row) for begin, end in self._passed if end > row)

  def resume_from(self, step: int) -> None:
    """Drops what was left out after a step from which the run goes on: it comes again. What is passed over stays so."""
    kept = [bad for bad in self.found if bad.step <= step or bad.action == 'rollback']
    if self._writes:
      self._lines = Lines(self._file)
      if self._file.exists():  # without what a kill left of a line, too
        write_atomic(self._file, ''.join(map(_line, kept)))
      elif kept:
        self._lines.write(''.join(map(_line, kept)))
    self.found = kept
    left_out, in_a_row = {bad.step for bad in kept if bad.action != 'rollback'}, 0
    while step - in_a_row in left_out:
      in_a_row += 1
    # Of starts that go on within a row of bad steps, none begins to count anew.
    self._last, self._in_a_row = step, broadcast('bad steps in a row', in_a_row)

  def flush(self) -> None:
    """Returns when every line is on the disk.

    Raises:
      UserError: there is no space for them; they stay in memory.
    """
    self._lines.flush()

  def add(self, step: int, rows: tuple[int, int], loss: float, grad_norm: float) -> BadStep:
    """Writes down a bad step, and raises what it leads to.

    Raises:
      UserError: it ends the run.
      Fault: there were too many in a row.
      Rollback: the run goes back.
    """
    bad = BadStep(step, rows, loss, grad_norm, self._config.bad_step)
    self.found.append(bad)
    if self._writes:
      self._lines.write(_line(bad))
    self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
    self._last = step
    if self._in_a_row >= MAX_CONSECUTIVE:
      raise Fault(f'{bad}; it is bad step {self._in_a_row} in a row, expected: good steps in between')
    if bad.action == 'stop':
      raise UserError('loss' if not np.isfinite(loss) else 'gradient', loss if not np.isfinite(loss) else grad_norm,
                      f'a good step, or --config.faults.bad_step=skip or rollback; {bad}; its update was not made')
    if bad.action == 'rollback':
      self._passed = sorted([*self._passed, rows])
      raise Rollback(str(bad))
    return bad


def _line(bad: BadStep) -> str:
  return json_line(dataclasses.asdict(bad)) + '\n'


def _read(file: Path) -> list[BadStep]:
  found = []
  for number, line in enumerate(complete_lines(file), 1):
    try:
      match json.loads(line):
        case {'step': int(step), 'rows': [int(begin), int(end)], 'loss': float() | None as loss, 'grad_norm': float() | None as norm,
              'action': 'stop' | 'skip' | 'rollback' as action}:
          number_of = lambda value: float('nan') if value is None else value
          found.append(BadStep(step, (begin, end), number_of(loss), number_of(norm), action))
          continue
    except ValueError:
      pass
    # To leave it out could change which rows the run takes.
    raise UserError(f'{file}:{number}', line.strip()[:80], 'a line that the run wrote: step, rows, loss, grad_norm, action')
  return found
