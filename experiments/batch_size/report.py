"""What the experiment finds: tables of losses and noise scales, and the picture."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.batch_size.sweep import BATCHES, RATE, rate
from experiments.runs import Curves, Groups, Interval, Run, interval, table, told
from gptjax.files import save_figure

LOSS = 'eval/valid/loss'
NOISE = 'tokens', 'gradient_square', 'gradient_variance'
PARTS = 20
"""of a run, over which the ingredients are averaged"""
EARLY, LATE = slice(0, PARTS // 4), slice(-PARTS // 4, None)
CONTEXT = 128
"""tokens of a row"""


def averaged(lines: np.ndarray) -> np.ndarray:
  """The means [PARTS, 3] of lines [n, 3], at the last tokens of each part; an estimate of a single step is mostly noise."""
  parts = np.array_split(lines, PARTS)
  return np.array([[part[-1, 0], *part[:, 1:].mean(0)] for part in parts])


def scale(lines: np.ndarray) -> float:
  """The noise scale in tokens: the ratio of the means of its two ingredients (arXiv:1812.06162, appendix A.1)."""
  square, variance = lines[:, 1:].mean(0)
  return float(variance / square)


def at_rule(found: list[Run]) -> Groups:
  """The runs at the rate of the rule, by batch size."""
  chosen = (run for run in found if float(run.point['optimizer.peak_lr']) == rate(int(run.point['batch_size']), RATE, 8))
  return Groups(chosen, ['batch_size'])


def scales(groups: Groups, noise: Curves, rows: int, part: slice) -> Interval:
  """The interval of the noise scale over the seeds of a batch size, in a part of the runs."""
  return interval(scale(noise[run.trial][part]) for run in groups[f'batch_size={rows}'].values())


def compared(found: list[Run], noise: Curves) -> str:
  """Loss, what it is above that of the best batch size, and the noise scale, by batch size over seeds."""
  groups = at_rule(found)
  best, lines = groups.best(LOSS), []
  for rows in BATCHES:
    name = f'batch_size={rows}'
    mean, half = groups.difference(name, best, LOSS)
    lines.append([f'{rows * CONTEXT:,}', f'{int(next(iter(groups[name].values())).metrics["step"])}', f'{rate(rows, RATE, 8):g}',
                  told(groups.mean(name, LOSS), 3), 'the best' if name == best else f'{mean:+.3f} ± {half:.3f}',
                  *(told(scales(groups, noise, rows, part), 0) for part in (EARLY, LATE))])
  header = ['tokens per step', 'steps', 'rate', 'loss', 'above the best', 'noise scale, first quarter', 'noise scale, last quarter']
  return table(header, lines)


def checked(found: list[Run]) -> str:
  """The loss of seed 0 at half the rate of the rule, at that rate, and at twice it, for the least and the greatest batch size."""
  losses = {(int(run.point['batch_size']), float(run.point['optimizer.peak_lr'])): run.metrics[LOSS] for run in found if not run.seed}
  rows = [[f'{rows * CONTEXT:,}', *(f'{losses[rows, factor * rate(rows, RATE, 8)]:.3f}' for factor in (0.5, 1.0, 2.0))]
          for rows in (BATCHES[0], BATCHES[-1])]
  return table(['tokens per step', 'half the rate', 'the rate', 'twice the rate'], rows)


def draw(found: list[Run], noise: Curves, path: Path) -> None:
  """Writes a PNG: the loss over the batch size beside the noise scales, and the noise scale during the runs."""
  figure = Figure(figsize=(9, 3.8), layout='constrained')
  left, right = figure.subplots(1, 2)
  groups, tokens = at_rule(found), [rows * CONTEXT for rows in BATCHES]
  means, halves = zip(*(groups.mean(f'batch_size={rows}', LOSS) for rows in BATCHES))
  left.errorbar(tokens, means, halves, fmt='o-', color='black', capsize=3, markersize=4)
  for part, color, label in ((EARLY, 'tab:green', 'first'), (LATE, 'tab:red', 'last')):
    each = [scales(groups, noise, rows, part)[0] for rows in BATCHES]
    left.axvspan(min(each), max(each), color=color, alpha=0.2, linewidth=0, label=f'noise scale, {label} quarter')
  for rows, color in zip(BATCHES, colormaps['viridis'](np.linspace(0, 0.9, len(BATCHES)))):
    mean = np.mean([noise[run.trial] for run in groups[f'batch_size={rows}'].values()], 0)
    along = [scale(mean[at:at + 2]) for at in range(0, PARTS, 2)]
    right.plot(mean[1::2, 0] / 1000, along, 'o-', color=color, markersize=3, linewidth=1, label=f'{rows * CONTEXT:,}')
  left.set_xscale('log', base=2)
  left.set_xticks(tokens, [f'{one:,}' for one in tokens])
  left.set(xlabel='tokens per step', ylabel='final loss, nats per byte')
  left.set_title(f'equal tokens, {len(groups)} batch sizes', fontsize=10)
  left.legend(frameon=False, fontsize=9)
  right.set_yscale('log')
  right.set(xlabel='thousand tokens trained on', ylabel='noise scale, tokens')
  right.set_title('mean of three seeds, by tokens per step', fontsize=10)
  right.legend(frameon=False, fontsize=8)
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
  save_figure(figure, path, dpi=100)
