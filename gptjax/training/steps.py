"""The steps of a run, one after the other: the rows that each takes, and its dispatch."""

import time
from collections.abc import Callable, Generator
from typing import NamedTuple

import jax
import numpy as np

from gptjax.checkpoint import Progress
from gptjax.sharding import put_rows
from gptjax.training.guard import BadSteps
from gptjax.training.run import Run
from gptjax.training.step import TrainState

Source = Callable[[int], Generator[dict[str, np.ndarray], None, None]]
"""(row) -> the batches from that row of the run on, each with the rows of this process; `Run.batches` is one."""


class Dispatched(NamedTuple):
  """A step that the devices may still be computing."""

  step: int
  rows: tuple[int, int]
  """its first row and the one after its last"""
  passed_over: int
  """number of rows before them that are left out since an earlier attempt was bad"""
  metrics: dict[str, jax.Array]


class Steps:
  """Dispatches the steps of a run.

  Args:
    run: its step compiles at the first call.
    source: of the batches.
    bad_steps: the rows to pass over.
    state: where to start.
    progress: of that state.
  """

  def __init__(self, run: Run, source: Source, bad_steps: BadSteps, state: TrainState, progress: Progress):
    self._run, self._source, self._bad_steps = run, source, bad_steps
    self.state, self.step, self.row = state, progress.step, progress.rows
    self.waited = 0.0
    """seconds in which there was no batch"""
    self._batches = source(self.row)

  def dispatch(self) -> Dispatched:
    """Dispatches the next step without waiting for it. The state before it is donated."""
    size = self._run.config.batch_size
    row = self._bad_steps.next_row(self.row, size)
    passed_over = row - self.row
    if passed_over:
      self._batches.close()
      self._batches = self._source(row)
    start = time.perf_counter()
    batch = next(self._batches)
    self.waited += time.perf_counter() - start
    self.state, metrics = self._run.step(self.state, put_rows(self._run.mesh, batch, size))
    self.step, self.row = self.step + 1, row + size
    return Dispatched(self.step, (row, self.row), passed_over, metrics)

  def close(self) -> None:
    """Ends the threads that load batches."""
    self._batches.close()
