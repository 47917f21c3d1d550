"""A fit as text and as a picture."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.scaling_law.fit import CONFIDENCE, Fit, Law, Runs
from experiments.scaling_law.isoflop import LEAST_MODELS, IsoFlop
from experiments.scaling_law.trials import Trials
from gptjax.files import save_figure


def described(runs: Trials, found: Fit, curves: IsoFlop) -> str:
  """The figures of both methods with their intervals, a line each."""
  largest = runs.compute.max()
  figures: dict[str, Callable[[Law], float]] = {
    'E': lambda law: law.E, 'A': lambda law: law.A, 'B': lambda law: law.B, 'alpha': lambda law: law.alpha, 'beta': lambda law: law.beta,
    'a, best N ~ C^a': lambda law: law.exponents[0], 'b, best D ~ C^b': lambda law: law.exponents[1],
    f'best N for C = 6 N D = {largest:.3g}': lambda law: law.optimum(largest)[0],
    f'best D for C = 6 N D = {largest:.3g}': lambda law: law.optimum(largest)[1]}
  rows = [(name, f'{figure(found.law):.5g}', _ends(found.interval(figure))) for name, figure in figures.items()]
  rows += [('', '', ''), ('IsoFLOP: best N for C', '', '' if curves.budgets else f'no budget has {LEAST_MODELS} models')]
  rows += [(f'{one.compute:.3g} ({len(one.runs)} runs)', f'{one.best:.5g}', _ends(one.interval)) if one.has_minimum else
           (f'{one.compute:.3g} ({len(one.runs)} runs)', 'none', 'between the smallest and the largest model') for one in curves.budgets]
  rows += [] if math.isnan(curves.exponent) else [('a, best N ~ C^a', f'{curves.exponent:.5g}', _ends(curves.interval))]
  ratio = runs.compute / (6 * runs.parameters * runs.tokens)
  return '\n'.join([
    f'{len(runs.loss)} runs; left out, without a loss or their last steps, or short: {runs.left_out}',
    f'N {_range(runs.parameters)}, D {_range(runs.tokens)}, C {_range(runs.compute)} FLOPs, which is {_range(ratio)} times 6 N D',
    f'residuals {np.std(found.residuals):.2%} of the loss, objective {found.objective:.6g}', '',
    f'{"L = E + A / N^alpha + B / D^beta":45}   interval of {CONFIDENCE:.0%}',
    *(f'{left:32}{value:>13}   {more}'.rstrip() for left, value, more in rows)])


def _range(values: Runs) -> str:
  return f'{values.min():.3g} to {values.max():.3g}'


def _ends(ends: tuple[float, float]) -> str:
  return f'{ends[0]:.4g} to {ends[1]:.4g}'


def draw(runs: Trials, found: Fit, curves: IsoFlop, path: Path) -> None:
  """Writes a PNG: IsoFLOP curves with the best model of each, and the fitted loss of every run over its measured loss."""
  figure = Figure(figsize=(11, 4.6), layout='constrained')
  left, right = figure.subplots(1, 2)
  fitted, rest = found.law.loss(runs.parameters, runs.tokens), np.ones(len(runs.loss), bool)

  def points(some, color, label):
    left.plot(runs.parameters[some], runs.loss[some], 'o', color=color, markersize=4, label=label)
    right.plot(runs.loss[some], fitted[some], 'o', color=color, markersize=4)

  for one, color in zip(curves.budgets, colormaps['viridis'](np.linspace(0, 0.9, len(curves.budgets)))):
    points(one.runs, color, f'{one.compute:.2g} FLOPs')
    rest[one.runs] = False
    models = runs.parameters[one.runs]
    line = np.geomspace(models.min(), models.max(), 100)
    left.plot(line, one.loss(line), color=color, linewidth=1)
    if one.has_minimum:
      left.plot(one.best, one.loss(np.array([one.best])), 'v', color='crimson', markersize=7)
  if rest.any():
    points(rest, 'gray', 'other runs')
  law, ends = found.law, [min(fitted.min(), runs.loss.min()), max(fitted.max(), runs.loss.max())]
  right.plot(ends, ends, color='gray', linewidth=1, zorder=0)
  power = '' if math.isnan(curves.exponent) else f': the best N (triangles) grows as C^{curves.exponent:.3f}'
  left.set(xscale='log', xlabel='N, parameters', ylabel='loss, nats per token')
  left.set_title(f'IsoFLOP{power}', fontsize=10, parse_math=False)
  left.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  right.set(xlabel='measured loss, nats per token', ylabel='fitted loss, nats per token', aspect='equal')
  right.set_title(f'L = {law.E:.3g} + {law.A:.3g} / N^{law.alpha:.3f} + {law.B:.3g} / D^{law.beta:.3f}', fontsize=10, parse_math=False)
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
  save_figure(figure, path, dpi=150)
