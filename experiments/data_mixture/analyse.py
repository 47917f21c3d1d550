"""Scores by share and by passes: python -m experiments.data_mixture.analyse --trials=CSV --picture=PNG"""

import dataclasses
import math
from pathlib import Path

from absl import flags
from matplotlib.figure import Figure

from experiments.data_mixture.sweep import ALL, PASSES, SEEDS, SHARES, STORES, mixture, repeated
from experiments.runs import Groups, Run, read, table, told
from gptjax import config as configs
from gptjax.files import expanded, save_figure, writable

_TRIALS = flags.DEFINE_string('trials', None, "the small sweep's trials.csv", required=True)
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture')
_SETS = {'code': 'tab:blue', 'books': 'tab:orange'}
_POINTS = {str(mixture(STORES, share)): {'books': f'{share:g}'} for share in SHARES} | {
  str(repeated(STORES, passes, seed)): {'passes': f'{passes}'} for passes in PASSES for seed in range(SEEDS)}
"""what a run stands for, by its data.train"""


def main(_: object) -> None:
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  runs = Groups(map(_named, read(expanded(_TRIALS.value, '--trials'))))
  print('\n\n'.join([shares(runs), repeats(runs)]))
  if picture:
    draw(runs, picture)


def _named(run: Run) -> Run:
  """A run by its share or passes, with bits per byte; every byte is a token."""
  data = run.point.get('data.train', '')
  if data not in _POINTS:
    raise configs.UserError('--trials: data.train', data, 'a mixture of the small sweep')
  return dataclasses.replace(run, point=_POINTS[data], metrics={name: run.metrics[f'eval/{name}/loss'] / math.log(2) for name in _SETS})


def shares(runs: Groups) -> str:
  """Bits per byte of both held-out sets by the share of books, and the differences from code alone with the same seeds."""
  rows = []
  for share in SHARES:
    name = f'books={share:g}'
    rows.append([f'{share:.0%}', *(cell for held_out in _SETS for cell in (told(runs.mean(name, held_out), 3),
                                                                          _difference(runs, name, f'books={SHARES[0]:g}', held_out)))])
  return table(['books', 'bits per byte of code', 'more than without books', 'bits per byte of books', 'more than without books'], rows)


def repeats(runs: Groups) -> str:
  """Bits per byte of held-out code by the passes over the same text, and what they cost."""
  rows = [[f'{passes}', f'{ALL // passes:,}', told(runs.mean(f'passes={passes}', 'code'), 3),
           _difference(runs, f'passes={passes}', 'passes=1', 'code')] for passes in PASSES]
  return table(['passes', 'different tokens', 'bits per byte of code', 'more than one pass'], rows)


def _difference(runs: Groups, name: str, base: str, held_out: str) -> str:
  """In bold where the interval does not include 0."""
  if name == base:
    return ''
  mean, half = runs.difference(name, base, held_out)
  words = f'{mean:+.3f} ± {half:.3f}'
  return f'**{words}**' if abs(mean) > half else words


def draw(runs: Groups, path: Path) -> None:
  """Writes a PNG: both scores by the share, and the cost of passes."""
  figure = Figure(figsize=(9, 3.8), layout='constrained')
  left, right = figure.subplots(1, 2)
  for name, color in _SETS.items():
    means, halves = zip(*(runs.mean(f'books={share:g}', name) for share in SHARES))
    left.errorbar([100 * share for share in SHARES], means, halves, fmt='o-', color=color, capsize=3, label=f'held-out {name}')
  left.set(xlabel='books in the training data, % of the tokens (the rest is code)', ylabel='bits per byte')
  left.set_title('shares', fontsize=10)
  left.legend(frameon=False, fontsize=9)
  means, halves = zip(*(runs.difference(f'passes={passes}', 'passes=1', 'code') for passes in PASSES))
  right.errorbar(PASSES, means, halves, fmt='o-', color=_SETS['code'], capsize=3, markersize=4)
  right.axhline(0, color='black', linewidth=0.8)
  right.set_xscale('log', base=2)
  right.set_xticks(PASSES, [f'{passes}' for passes in PASSES])
  right.set(xlabel=f'passes over the same text, {ALL:,} tokens in all', ylabel='bits per byte of code beyond one pass')
  right.set_title('repeats', fontsize=10)
  for axes in (left, right):
    axes.spines[['top', 'right']].set_visible(False)
  save_figure(figure, path, dpi=100)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
