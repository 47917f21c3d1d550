"""What is on the disk about the trials of a sweep: how far each one is, and trials.csv."""

import contextlib
import csv
import io
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import UserError
from gptjax.files import read_json, write_json
from gptjax.sweeps.claims import is_claimed
from gptjax.sweeps.trials import Sweep, Trial

_LEFT = 600
"""Seconds after which a file that is not renamed will not be."""
RESULT, RUNGS = 'result.json', 'rungs.json'
"""In the workdir of a trial: how it ended, and its values at the rungs of successive halving."""
_TAIL = 2**16
"""Bytes at the end of metrics.jsonl that have the last of every metric, or a worker waits for more of it."""


class Status(NamedTuple):
  """How far a trial is."""

  name: str
  """waiting, running, done, failed or stopped (by early stopping)"""
  metrics: dict[str, Any]
  """the last of every metric, with `step`"""
  error: str = ''
  seconds: float = 0.0
  """spent on it, where it has ended"""


def last_metrics(folder: Path, step: int = 0) -> dict[str, Any]:
  """The last value of every metric of a run, and its last step; {} before the first. With `step` the metrics of that step alone."""
  path, found = folder / 'metrics.jsonl', dict[str, Any]()
  try:
    with path.open('rb') as file:
      file.seek(max(0, path.stat().st_size - _TAIL))
      lines = file.read().split(b'\n')
  except FileNotFoundError:
    return {}
  for line in lines[:-1]:  # the last one is empty, or not complete
    with contextlib.suppress(ValueError):  # the first one may be cut
      record = json.loads(line)
      found |= record if step in (0, record['step']) else {}
  return found


def metric_of(sweep: Sweep, folder: Path, step: int = 0) -> float:
  """The sweep's metric of a run, its last or that of a step, such that less is better. Raises a UserError if the run has none."""
  found = last_metrics(folder, step)
  if sweep.metric not in found:
    where = f' at step {step}, where early stopping reads it' if step else ''
    raise UserError('metric', sweep.metric, f'a metric of the run{where}: {", ".join(sorted(found)) or "there are none"}', sorted(found))
  value = found[sweep.metric]
  return float('inf') if value is None else -value if sweep.maximize else float(value)


def end_trial(folder: Path, status: str, seconds: float, error: str = '') -> None:
  """Records that a trial is over: done or failed."""
  total = round(spent(folder, seconds), 1)
  write_json(folder / RESULT, {'status': status, 'seconds': total, 'error': error, 'metrics': last_metrics(folder)})


def spent(folder: Path, seconds: float) -> float:
  """Adds to the seconds that processes of a trial have run, and returns the sum."""
  with (folder / 'seconds').open('a') as file:
    file.write(f'{seconds:.1f}\n')
  return sum(map(float, (folder / 'seconds').read_text().split()))


def status_of(folder: Path) -> Status:
  """The status of the trial in a folder, which may not exist yet."""
  with contextlib.suppress(UserError):  # there is none, or another worker removes it at this moment
    found = read_json(folder / RESULT)
    return Status(found['status'], found['metrics'], found['error'], found['seconds'])
  try:
    return Status('running' if is_claimed(folder) else 'stopped' if rungs_of(folder) else 'waiting', last_metrics(folder))
  except FileNotFoundError:
    return Status('waiting', {})


def rungs_of(folder: Path) -> dict[int, float]:
  """The values of a trial at the rungs that it has reached."""
  return {int(step): value for step, value in read_json(folder / RUNGS)['values'].items()} if (folder / RUNGS).exists() else {}


def add_rung(folder: Path, step: int, value: float) -> None:
  """Records the value at a rung."""
  found = read_json(folder / RUNGS) if (folder / RUNGS).exists() else {'values': {}, 'promoted': {}}
  found['values'][str(step)] = value
  write_json(folder / RUNGS, found)


def write_table(path: Path, sweep: Sweep, trials: Sequence[Trial], statuses: Iterable[Status]) -> None:
  """Writes trials.csv: a line per trial, with its overrides, the last of its losses, and the metric of the sweep."""
  rows, statuses = [], list(statuses)
  losses = {name for status in statuses for name in status.metrics if name.startswith('eval/') and name.endswith('/loss')}
  scores = sorted(losses | {sweep.metric} - {'loss', 'step'})
  fields = list(dict.fromkeys(name for trial in trials for name in trial.point))
  for trial, status in zip(trials, statuses, strict=True):
    figures = {name: status.metrics.get(name) for name in ('step', 'loss', *scores)}
    rows.append({'trial': trial.name, 'status': status.name, **trial.point, **figures, 'seconds': status.seconds or None})
  text = io.StringIO()
  table = csv.DictWriter(text, ['trial', 'status', *fields, 'step', 'loss', *scores, 'seconds'], lineterminator=os.linesep)
  table.writeheader()
  table.writerows({name: '' if value is None else value for name, value in row.items()} for row in rows)
  write_shared(path, text.getvalue())


def write_shared(path: Path, text: str) -> None:
  """Writes a file that other processes may write at the same moment: the last one counts, and a reader sees one of them."""
  partial = path.with_name(f'.{path.name}.{os.uname().nodename}.{os.getpid()}')
  partial.write_text(text, encoding='utf-8')
  partial.rename(path)
  for left in path.parent.glob(f'.{path.name}.*'):  # by a process that was killed
    with contextlib.suppress(FileNotFoundError):
      if time.time() - left.stat().st_mtime > _LEFT:
        left.unlink()
