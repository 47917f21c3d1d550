"""What the experiment finds: tables of losses, steps and CPU time, and the picture."""

import csv
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments.optimizers.sweep import BEST, RATE, TARGETS
from experiments.runs import Curves, Groups, Interval, Run, interval, table, told
from gptjax.config import UserError
from gptjax.files import save_figure

LOSS = 'eval/valid/loss'
CURVE = ('step', LOSS)
COLORS = {'adamw': 'tab:blue', 'muon': 'tab:orange', 'lion': 'tab:green'}
TITLES = {'adamw': 'AdamW', 'muon': 'Muon', 'lion': 'Lion'}


def cost(path: Path) -> dict[str, Interval]:
  """CPU milliseconds of a step by optimizer, with intervals over blocks; raises a UserError for a file that `cost` did not write."""
  try:
    with path.open(newline='', encoding='utf-8') as file:
      rows = [(row['optimizer'], float(row['milliseconds'])) for row in csv.DictReader(file, strict=True)]
    return {name: interval([value for one, value in rows if one == name]) for name in {name for name, _ in rows} & RATE.keys()}
  except (OSError, UnicodeDecodeError, csv.Error, TypeError, ValueError, KeyError) as error:
    raise UserError(str(path), str(error), 'what experiments.optimizers.cost prints') from None


def best(found: list[Run]) -> Groups:
  """The runs at the best rates, by optimizer."""
  return Groups((run for run in found if float(run.point[RATE[name := run.point['optimizer.name']]]) == BEST[name]), ['optimizer.name'])


def reached(curve: np.ndarray, loss: float) -> float:
  """The step at which a curve [n, 2] of steps and losses first falls to a loss, between two validations by a straight line; inf: never."""
  below = np.flatnonzero(curve[:, 1] <= loss)
  if not len(below) or not below[0]:
    return float('inf') if not len(below) else float(curve[0, 0])
  (before, high), (after, low) = curve[below[0] - 1:below[0] + 1]
  return float(before + (after - before) * (high - loss) / (high - low))


def rates(found: list[Run]) -> str:
  """The loss of seed 0 at every rate; the chosen one in bold."""
  rows = []
  for name, field in RATE.items():
    tried = sorted((float(run.point[field]), run.metrics[LOSS]) for run in found if run.point['optimizer.name'] == name and not run.seed)
    words = [f'{rate:g}: {loss:.3f}' for rate, loss in tried]
    rows.append([TITLES[name], ', '.join(f'**{word}**' if rate == BEST[name] else word for word, (rate, _) in zip(words, tried))])
  return table(['optimizer', 'peak rate: loss of seed 0'], rows)


def compared(found: list[Run], curves: Curves, costs: dict[str, Interval]) -> str:
  """Loss, its difference from AdamW's, steps to each target and CPU time, over seeds."""
  groups, rows = best(found), []
  for name in RATE:
    seeds = groups[f'name={name}']
    more = groups.difference(f'name={name}', 'name=adamw', LOSS)
    words = '' if name == 'adamw' else '+' * (more[0] > 0) + told(more, 3)
    cells = [TITLES[name], told(groups.mean(f'name={name}', LOSS), 3), words, told(costs[name], 2)]
    for target in TARGETS:
      steps = interval(reached(curves[run.trial], target) for run in seeds.values())
      cells += [told(steps, 0), f'{steps[0] * costs[name][0] / 1000:.1f}'] if np.isfinite(steps[0]) else ['not reached', '']
    rows.append(cells)
  header = [cell for target in TARGETS for cell in (f'steps to {target}', f'CPU-seconds to {target}')]
  return table(['optimizer', 'loss', 'difference from AdamW', 'CPU ms per step', *header], rows)


def draw(found: list[Run], curves: Curves, path: Path) -> None:
  """Writes a PNG: the loss over the rate, and over the steps at the best rates."""
  figure = Figure(figsize=(9, 3.8), layout='constrained')
  left, right = figure.subplots(1, 2)
  groups = best(found)
  for name, field in RATE.items():
    tried = sorted((float(run.point[field]), run.metrics[LOSS]) for run in found if run.point['optimizer.name'] == name and not run.seed)
    left.plot(*zip(*tried), 'o-', color=COLORS[name], markersize=4, label=TITLES[name] + (', rate of matrices' if name == 'muon' else ''))
    for run in groups[f'name={name}'].values():
      right.plot(*curves[run.trial].T, color=COLORS[name], linewidth=1)
  for target in TARGETS:
    right.axhline(target, color='gray', linewidth=0.8, linestyle=':')
  left.set(xscale='log', xlabel='peak learning rate', ylabel='final loss, nats per byte')
  left.set_title('one seed at every rate', fontsize=10)
  left.legend(frameon=False, fontsize=9)
  right.set(xlabel='step', ylabel='loss of 64 held-out rows', ylim=(1.5, 3.5))
  right.set_title('all seeds at the best rate', fontsize=10)
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
  save_figure(figure, path, dpi=100)
