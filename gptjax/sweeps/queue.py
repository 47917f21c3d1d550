"""Which trial a worker runs next, and up to which step: all from files on the disk that workers share."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.config import UserError
from gptjax.files import read_json, write_json
from gptjax.sweeps.claims import Claim, Claims, is_claimed
from gptjax.sweeps.points import Point
from gptjax.sweeps.results import RESULT, RUNGS, metric_of, rungs_of, status_of
from gptjax.sweeps.sampling import adaptive_point
from gptjax.sweeps.trials import Adaptive, Sweep, Trial, make_trials


class Job(NamedTuple):
  """A trial to run."""

  trial: Trial
  folder: Path
  stop_at: int
  """the rung to run to; 0: the end"""
  claim: Claim


class Queue:
  """The trials of a sweep in a folder; `path` is the sweep's file."""

  def __init__(self, sweep: Sweep, path: Path, out: Path, beat: float):
    self.sweep, self._path, self._out, self._claims = sweep, path, out, Claims(beat)
    self._over: set[str] = set()
    self._draws: list[Point] = []
    self._trials = [] if isinstance(sweep.points, Adaptive) else make_trials(sweep, sweep.points, path)

  @property
  def trials(self) -> Sequence[Trial]:
    """All trials; of an adaptive sweep those that have been drawn."""
    if isinstance(self.sweep.points, Adaptive):
      while (file := self._draw_file(len(self._draws))).exists():
        self._draws.append(read_json(file)['point'])
        self._trials += make_trials(self.sweep, self._draws[-1:], self._path)
    return self._trials

  def folder(self, trial: Trial) -> Path:
    """The workdir of a trial."""
    return self._out / 'trials' / trial.name

  def forget_failures(self) -> None:
    """Makes trials that failed run again."""
    for trial in self.trials:
      if status_of(self.folder(trial)).name == 'failed':
        (self.folder(trial) / RESULT).unlink(missing_ok=True)

  def next(self) -> Job | None:
    """Claims a trial; None if there is none to claim, now or at all."""
    trials = [trial for trial in self.trials if not self._is_over(trial)]
    rungs = list(self.sweep.halving.rungs) if self.sweep.halving else []
    if rungs:
      values = {trial.name: rungs_of(self.folder(trial)) for trial in self.trials}
      if job := self._promoted(trials, values, rungs):
        return job
      trials = [trial for trial in trials if not values[trial.name]]
    for trial in trials:
      if job := self._claimed(trial, rungs[0] if rungs else 0):
        return job
    return self.next() if self._draw() else None

  def is_over(self) -> bool:
    """Whether nobody runs a trial, so that no more can come; to be asked after `next` has found none."""
    return not any(is_claimed(folder) for trial in self.trials if not self._is_over(trial) and (folder := self.folder(trial)).exists())

  def _is_over(self, trial: Trial) -> bool:
    if trial.name not in self._over and (self.folder(trial) / RESULT).exists():
      self._over.add(trial.name)
    return trial.name in self._over

  def _claimed(self, trial: Trial, stop_at: int) -> Job | None:
    folder = self.folder(trial)
    folder.mkdir(parents=True, exist_ok=True)
    if not (claim := self._claims.take(folder)):
      return None
    if self._is_over(trial) or (stop_at and stop_at in rungs_of(folder)):  # meanwhile
      claim.release()
      return None
    return Job(trial, folder, stop_at, claim)

  def _promoted(self, trials: Sequence[Trial], values: dict[str, dict[int, float]], rungs: list[int]) -> Job | None:
    """A trial that goes on from a rung, from the highest rung down: the best 1 / reduction of those that have reached it."""
    assert self.sweep.halving
    for rung, following in reversed(list(zip(rungs, [*rungs[1:], 0]))):
      reached = sorted((found[rung], name) for name, found in values.items() if rung in found)
      best = [name for value, name in reached[:len(reached) // self.sweep.halving.reduction] if value < float('inf')]
      for trial in trials:
        found = values[trial.name]
        if rung not in found or following in found:
          continue
        choice = read_json(self.folder(trial) / RUNGS)
        chosen = str(rung) in choice['promoted']
        if (chosen or trial.name in best) and (job := self._claimed(trial, following)):
          if not chosen:  # so that the choice can be checked, and stands after the worker has died
            choice['promoted'][str(rung)] = {name: value for value, name in reached}
            write_json(job.folder / RUNGS, choice)
          return job
    return None

  def _draw(self) -> bool:
    """Draws a point of an adaptive sweep; returns whether there is a new one, from this worker or another."""
    adaptive = self.sweep.points
    if not isinstance(adaptive, Adaptive) or len(trials := self.trials) >= adaptive.count:
      return False
    number, results = len(self._draws), {}
    for index, trial in enumerate(trials):
      status = status_of(self.folder(trial))
      if status.name in ('done', 'failed'):
        results[index] = None if status.name == 'failed' else metric_of(self.sweep, self.folder(trial))
    point = self._point_after(self._draws, results)
    if point is None:
      return False
    file = self._draw_file(number)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f'{file.name}.{os.uname().nodename}.{os.getpid()}.{id(self)}')
    partial.write_text(json.dumps({'point': point, 'results': results}))
    try:
      os.link(partial, file)  # unlike a rename, fails if another worker was faster
    except FileExistsError:
      pass
    finally:
      partial.unlink()
    return True

  def preview(self) -> list[Trial]:
    """The next points of an adaptive sweep that do not depend on results."""
    trials, adaptive = self.trials, self.sweep.points
    points, count = list(self._draws), min(adaptive.startup, adaptive.count) if isinstance(adaptive, Adaptive) else 0
    while len(points) < count and (point := self._point_after(points, {})):
      points.append(point)
    return make_trials(self.sweep, points[len(trials):], self._path)

  def _point_after(self, points: Sequence[Point], results: dict[int, float | None]) -> Point | None:
    """The next point of an adaptive sweep, whose config passes its checks; a UserError if not even the first one can."""
    wrong = []

    def is_valid(point: Point) -> bool:
      try:
        return bool(make_trials(self.sweep, [point], self._path))
      except UserError as error:
        wrong.append(error)
        return False

    assert isinstance(self.sweep.points, Adaptive)
    found = adaptive_point(self.sweep.points, points, results, is_valid)
    if found is None and not points:
      raise wrong[0]
    return found

  def _draw_file(self, number: int) -> Path:
    return self._out / 'draws' / f'{number:05}.json'
