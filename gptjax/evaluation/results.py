"""Results of an evaluation: one record per checkpoint, as JSON, tables and plots."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.evaluation.classes import class_figures
from gptjax.evaluation.score import Score, Scores
from gptjax.files import save_figure

Record = dict[str, Any]
"""`step`; for documents, the fields of Score over all sets together, for classes the `class_figures`, for pairs their means, and `sets` and
`tags` with those of each set and tag; for tasks, `tasks` with the metrics, METRIC_stderr, examples, fewshot and version of each task."""

ALL_SETS = 'all sets'
"""Name of the score of all sets together, which no set may have."""

_Curve = tuple[list[int], list[float], list[float]]
"""Steps, values and standard errors (0: unknown)."""


def record(step: int, scores: Scores | None, tasks: Mapping[str, Mapping[str, Any]] | None, labels: Sequence[str] = ()) -> Record:
  """The record of a checkpoint, with `None` results left out; `labels`: names of the classes."""
  def figures(score: Score) -> Record:
    found = dataclasses.asdict(score)
    confusion, means, examples = (found.pop(name) for name in ('confusion', 'figures', 'examples'))
    if examples:
      return {'loss': score.loss, **means, 'examples': examples, 'tokens': score.tokens}
    return found | class_figures(confusion, labels) if confusion else found

  found: Record = {'step': step}
  if scores:
    groups = {'sets': scores.sets, 'tags': scores.tags}
    found = {**figures(scores.overall), **found, **{group: {name: figures(one) for name, one in some.items()}
                                                    for group, some in groups.items()}}
  return found | ({'tasks': {name: dict(metrics) for name, metrics in tasks.items()}} if tasks is not None else {})


def documents(found: Record) -> dict[str, Record]:
  """The document scores of a record by name: NAME, tag/TAG, and, if there are several sets, ALL_SETS."""
  named = {**found.get('sets', {}), **{f'tag/{tag}': score for tag, score in found.get('tags', {}).items()}}
  return named | ({ALL_SETS: found} if len(found.get('sets', {})) > 1 else {})


def metrics(found: Record) -> dict[tuple[str, str], tuple[float, float | None]]:
  """(value, standard error or None) of each (task, metric) of a record."""
  return {(task, name): (value, values.get(f'{name}_stderr')) for task, values in found.get('tasks', {}).items()
          for name, value in values.items() if not name.endswith('_stderr') and name not in ('examples', 'fewshot', 'version')}


def table(records: Sequence[Record]) -> str:
  """A table for the terminal: a line per step and set (unless there is only one), then a line per step and metric of each task."""
  lines = []
  rows = [(found['step'], name, score) for found in records for name, score in documents(found).items()]
  pairs = [row for row in rows if 'examples' in row[2]]
  if pairs:
    names = [name for name in pairs[0][2] if name not in ('examples', 'tokens')]
    lines.append(f'{"step":>9}  {"set":<22}' + ''.join(f'{name:>{max(len(name) + 2, 10)}}' for name in names) + f'{"examples":>10}')
    for step, name, score in pairs:
      lines.append(f'{step:>9}  {name:<22}' + ''.join(f'{_short(score[one]):>{max(len(one) + 2, 10)}}' for one in names)
                   + f'{score["examples"]:>10,}')
  rows = [row for row in rows if 'accuracy' not in row[2] and 'examples' not in row[2]]
  if len(rows) > 1:
    lines.append(f'{"step":>9}  {"set":<22}{"loss":>10}{"perplexity":>14}{"bits/byte":>12}{"tokens":>14}')
    for step, name, score in rows:
      lines.append(f'{step:>9}  {name:<22}{score["loss"]:>10.4f}{score["perplexity"]:>14.3f}{score["bits_per_byte"]:>12.4f}'
                   f'{score["tokens"]:>14,}')
  values = [(found['step'], key, value, found['tasks'][key[0]]['examples']) for found in records for key, value in metrics(found).items()]
  if values:
    lines.append(f'{"step":>9}  {"task":<22}{"metric":<14}{"value":>14}{"std. error":>14}{"examples":>10}')
    for step, (task, name), (value, error), examples in values:
      lines.append(f'{step:>9}  {task:<22}{name:<14}{_short(value):>14}{"" if error is None else _short(error):>14}{examples or "":>10}')
  return '\n'.join(lines)


def _short(value: float) -> str:
  return f'{value:.4f}' if abs(value) < 1e3 else f'{value:,.1f}' if abs(value) < 1e7 else f'{value:.4g}'


def draw(records: Sequence[Record], path: Path) -> bool:
  """Writes a PNG with bits per byte and loss of each set, or the figures of classes, pairs and prompts, and metrics of tasks, over steps;
  metrics between 0 and 1, such as accuracies, have their own panel. Returns False, without a file, if there is no finite number to plot."""
  from matplotlib import rc_context
  from matplotlib.figure import Figure
  from matplotlib.ticker import LogFormatter

  keys = {key for one in records for key in metrics(one)}
  fractions = {key for key in keys if all(0 <= metrics(one)[key][0] <= 1 for one in records if key in metrics(one))}
  of_sets = lambda field: _curves(records, lambda one: {name: (score[field], None) for name, score in documents(one).items()
                                                        if field in score})
  of_tasks = lambda ours: _curves(records, lambda one: {' '.join(key): value for key, value in metrics(one).items() if key in ours})
  passed = _curves(records, lambda one: {f'{name} {figure}': (score[figure], None) for name, score in documents(one).items()
                                         for figure in score if figure.startswith('pass@') or figure == 'greedy'})
  rewarded = any('reward' in one for one in records)  # their loss is minus the reward
  per_pair = any('margin' in one for one in records)
  panels = [('held-out text', 'bits per byte', of_sets('bits_per_byte')),
            ('held-out pairs' if per_pair else 'held-out text', 'nats per pair' if per_pair else 'nats per token',
             {} if rewarded else of_sets('loss')),
            ('held-out prompts', 'reward', of_sets('reward')), ('held-out prompts', 'fraction that passes', passed),
            ('held-out classes or pairs', 'accuracy', of_sets('accuracy')), ('classes of held-out texts', 'macro F1', of_sets('macro_f1')),
            ('held-out pairs', 'margin', of_sets('margin')),
            ('tasks', 'fraction (bars: standard error)', of_tasks(fractions)), ('tasks', 'value', of_tasks(keys - fractions))]
  panels = [panel for panel in panels if panel[2]]
  if not panels:
    return False
  with rc_context({'text.parse_math': False}):  # names are no formulas
    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout='constrained')
    for axis, (title, unit, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
      for name, (steps, values, errors) in curves.items():  # a label that begins with _ would not be shown
        axis.errorbar(steps, values, errors if any(errors) else None, marker='o', markersize=3, linewidth=1, capsize=2, label=f' {name}')
      axis.set(title=title, xlabel='step', ylabel=unit)
      if min(min(values) for _, values, _ in curves.values()) > 0 and unit == 'value':
        axis.set_yscale('log')
        axis.yaxis.set_major_formatter(LogFormatter())  # the default labels are formulas
        axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)))
      axis.legend(fontsize='small', frameon=False)
      axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=130)
  return True


def _curves(records: Sequence[Record], values: Callable[[Record], dict[str, tuple[float, float | None]]]) -> dict[str, _Curve]:
  curves: dict[str, _Curve] = {}
  for one in records:
    for name, (value, error) in values(one).items():
      if math.isfinite(value):
        steps, means, errors = curves.setdefault(name, ([], [], []))
        steps.append(one['step'])
        means.append(value)
        errors.append(error or 0.0)
  return curves
