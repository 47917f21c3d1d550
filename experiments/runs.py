"""The trials of a sweep as an experiment reads them: groups that differ by their seeds alone, means and intervals over the seeds."""

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from gptjax.config import UserError
from gptjax.config.fields import FIELDS
from gptjax.files import complete_lines, write_atomic

CONFIDENCE = 0.95
"""of every interval over seeds"""
Interval = tuple[float, float]
"""A mean, and half the width of its interval by Student's t: nan for one value."""


@dataclasses.dataclass(frozen=True)
class Run:
  """A trial that is done."""

  point: dict[str, str]
  """values of the fields that the sweep varies, but for the seed; as text, as in the table"""
  seed: int
  metrics: dict[str, float]
  """its last step, losses and seconds, by column"""
  trial: str = ''
  """its name, which is that of its folder"""


def read(path: Path) -> list[Run]:
  """The runs of a sweep's trials.csv. Raises a UserError if it is not such a table, or a trial is not done."""
  try:
    with path.open(newline='', encoding='utf-8') as file:
      rows = list(csv.DictReader(file, strict=True))
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise UserError(str(path), str(error), "a sweep's trials.csv") from None
  if not rows or not {'trial', 'status', 'step'} <= rows[0].keys():
    raise UserError(str(path), ', '.join(rows[0] if rows else []), "a sweep's trials.csv, with trial, status and step")
  if undone := [row['trial'] for row in rows if row['status'] != 'done']:
    raise UserError(str(path), f'{len(undone)} trials that are not done, {undone[0]} for one', 'a sweep that is over')
  return [_run(row) for row in rows]


def _run(row: dict[str, str]) -> Run:
  fields = {name: value for name, value in row.items() if name in FIELDS and name != 'seed' and value != ''}
  metrics = {name: float(value) for name, value in row.items() if name not in FIELDS and name not in ('trial', 'status') and value}
  return Run(fields, int(row.get('seed') or 0), metrics, row['trial'])


Curves = dict[str, np.ndarray]
"""By trial: metrics [lines, columns] during the training."""


def logged(out: Path, runs: Iterable[Run], columns: Sequence[str]) -> Curves:
  """From the metrics.jsonl of a sweep's trials in `out`, the lines that have all columns. Raises a UserError where there is none."""
  found = {}
  for run in runs:
    path = out / 'trials' / run.trial / 'metrics.jsonl'
    lines = [[line[name] for name in columns] for line in map(json.loads, complete_lines(path)) if {*columns} <= line.keys()]
    if not lines:
      raise UserError('--out', str(out), f'the folder of the sweep: {path} has no {", ".join(columns)}')
    found[run.trial] = np.array(lines, float)
  return found


def write_curves(path: Path, curves: Curves, columns: Sequence[str]) -> None:
  """Writes curves as a CSV with four decimals or significant digits, whichever are more."""
  lines = [','.join([f'"{trial}"', *(f'{value:.4f}'.rstrip('0').rstrip('.') if abs(value) >= 1 else f'{value:.4g}' for value in row)])
           for trial, rows in curves.items() for row in rows]
  write_atomic(path, '\n'.join([','.join(['trial', *columns]), *lines]) + '\n')


def read_curves(path: Path, runs: Iterable[Run], columns: Sequence[str]) -> Curves:
  """What `write_curves` wrote, of these runs. Raises a UserError for a file that is not such a table, or that lacks a run."""
  found: dict[str, list[list[float]]] = {}
  try:
    with path.open(newline='', encoding='utf-8') as file:
      for row in csv.DictReader(file, strict=True):
        found.setdefault(row['trial'], []).append([float(row[name]) for name in columns])
    return {run.trial: np.array(found[run.trial]) for run in runs}
  except (OSError, UnicodeDecodeError, csv.Error, TypeError, ValueError, KeyError) as error:
    raise UserError(str(path), str(error), f'a table with trial, {", ".join(columns)} of all runs') from None


def interval(values: Iterable[float]) -> Interval:
  """The mean of measurements and half the width of its interval, by Student's t distribution."""
  found = np.array(list(values), float)
  if len(found) < 2:
    return float(found.mean()), float('nan')
  return float(found.mean()), float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * found.std(ddof=1) / len(found)**0.5)


class Groups(dict[str, dict[int, Run]]):
  """Runs by what they have in common, then by seed."""

  def __init__(self, runs: Iterable[Run], fields: Sequence[str] | None = None):
    """`fields`: those that make a group; without, all that the sweep varies but for the seed."""
    super().__init__()
    for run in runs:
      point = run.point if fields is None else {name: run.point[name] for name in fields if name in run.point}
      group = self.setdefault(label(point), {})
      if run.seed in group:
        raise UserError(label(point), f'two runs with seed {run.seed}', 'runs that differ by their seeds alone')
      group[run.seed] = run

  def __missing__(self, name: str) -> dict[int, Run]:
    raise UserError('--trials', name, f'a group of the table: {"; ".join(self)}'[:400])

  def mean(self, name: str, metric: str) -> Interval:
    """The interval of a metric over the seeds of a group."""
    return interval(run.metrics[metric] for run in self[name].values())

  def difference(self, name: str, baseline: str, metric: str) -> Interval:
    """The interval of what a group has more than another with the same seed: narrower than that of each, if the data order matters."""
    return interval(run.metrics[metric] - self[baseline][seed].metrics[metric] for seed, run in self[name].items()
                    if seed in self[baseline])

  def best(self, metric: str) -> str:
    """The group with the least mean."""
    return min(self, key=lambda name: self.mean(name, metric)[0])


def label(point: Mapping[str, object]) -> str:
  """'norm=rmsnorm, peak_lr=0.003': the last parts of the names, or 'recipe' for a point that changes nothing."""
  return ', '.join(f'{name.rpartition(".")[2]}={value}' for name, value in point.items()) or 'recipe'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table in Markdown."""
  return '\n'.join(f'| {" | ".join(row)} |' for row in (header, ['---'] * len(header), *rows))


def told(found: Interval, digits: int = 4) -> str:
  """'2.3456 ± 0.0120'."""
  mean, half = found
  return f'{mean:.{digits}f} ± {half:.{digits}f}' if half == half else f'{mean:.{digits}f}'
