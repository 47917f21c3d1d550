"""The batches of a run: rows of its data, or completions that its model draws, with what a teacher adds to them."""

import contextlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from gptjax.data import Prepared
from gptjax.sharding import put_rows
from gptjax.training.rewards import Rewards
from gptjax.training.rollouts import Rollouts
from gptjax.training.run import Run, Source
from gptjax.training.step import TrainState
from gptjax.training.teacher import Teacher


def source_of(run: Run, data: Prepared, workdir: Path, rewards: Rewards, progress: Callable[[int], None] = lambda rows: None,
              writes: bool = True) -> Source:
  """The batches of a run on its mesh: rows of its data, or completions that its model draws, for distillation with the teacher's hidden
  states. With `writes`, completions of a rollout of several steps are kept in the workdir."""
  rows = Rollouts(run, data, workdir, rewards, progress, writes) if run.config.objective.draws else run.batches
  teacher = Teacher(run, workdir) if run.config.objective.kind == 'distillation' else lambda batch: batch

  def source(row: int, state: Callable[[], TrainState]) -> Generator[dict[str, Any], None, None]:
    with contextlib.closing(rows(row, state)) as batches:
      for batch in batches:
        yield teacher(put_rows(run.mesh, batch, run.config.batch_size))
  return source
