"""Plots of scores over a run's checkpoints."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax.evaluation.results import Record, documents, metrics

Curve = tuple[list[int], list[float], list[float]]
"""Steps, values and standard errors (0: unknown)."""


def draw(records: Sequence[Record], path: Path) -> bool:
  """Writes a PNG with bits per byte and loss of each set, and metrics of tasks, over steps; metrics between 0 and 1, such as accuracies,
  have their own panel. Returns False, without a file, if there is no finite number to plot."""
  from matplotlib.figure import Figure

  keys = {key for one in records for key in metrics(one)}
  fractions = {key for key in keys if all(0 <= metrics(one)[key][0] <= 1 for one in records if key in metrics(one))}
  of_sets = lambda field: _curves(records, lambda one: {name: (score[field], None) for name, score in documents(one).items()})
  of_tasks = lambda ours: _curves(records, lambda one: {' '.join(key): value for key, value in metrics(one).items() if key in ours})
  panels = [('held-out text', 'bits per byte', of_sets('bits_per_byte')), ('held-out text', 'nats per token', of_sets('loss')),
            ('tasks', 'fraction (bars: standard error)', of_tasks(fractions)), ('tasks', 'value', of_tasks(keys - fractions))]
  panels = [panel for panel in panels if panel[2]]
  if not panels:
    return False
  figure = Figure(figsize=(4.6 * len(panels), 3.6), layout='constrained')
  for axis, (title, unit, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
    for name, (steps, values, errors) in curves.items():
      axis.errorbar(steps, values, errors if any(errors) else None, marker='o', markersize=3, linewidth=1, capsize=2, label=name)
    axis.set(title=title, xlabel='step', ylabel=unit)
    if min(min(values) for _, values, _ in curves.values()) > 0 and unit == 'value':
      axis.set_yscale('log')
    axis.legend(fontsize='small', frameon=False)
    axis.grid(alpha=0.3)
  figure.savefig(path, dpi=130)
  return True


def _curves(records: Sequence[Record], values: Callable[[Record], dict[str, tuple[float, float | None]]]) -> dict[str, Curve]:
  curves: dict[str, Curve] = {}
  for one in records:
    for name, (value, error) in values(one).items():
      if math.isfinite(value):
        steps, means, errors = curves.setdefault(name, ([], [], []))
        steps.append(one['step'])
        means.append(value)
        errors.append(error or 0.0)
  return curves
