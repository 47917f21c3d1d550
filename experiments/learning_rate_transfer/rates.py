"""The losses of a sweep over learning rates, and the best rate of every width."""

import math
from collections.abc import Iterable
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.runs import Interval, Run, interval, table, told
from gptjax.files import save_figure

LOSS = 'eval/valid/loss'
STANDARD, MUP, MUON = 'AdamW, standard', 'AdamW, muP', 'Muon'

Losses = dict[str, dict[int, dict[float, Interval]]]
"""Validation losses in nats per token over the seeds, by way to train, width and peak rate."""


def losses(runs: Iterable[Run]) -> Losses:
  """The losses of all runs. At the narrowest width, the base, runs in standard parametrization are those of muP too."""
  seen: dict[str, dict[int, dict[float, list[float]]]] = {}
  for run in runs:
    width, base = int(run.point['model.width']), int(run.point['model.mup_base'])
    muon = run.point['optimizer.name'] == 'muon'
    rate = float(run.point['optimizer.muon_lr' if muon else 'optimizer.peak_lr'])
    kind = MUON if muon else MUP if base else STANDARD
    seen.setdefault(kind, {}).setdefault(width, {}).setdefault(rate, []).append(run.metrics[LOSS])
  if {STANDARD, MUP} <= seen.keys():
    narrowest = min(seen[STANDARD])
    seen[MUP].setdefault(narrowest, seen[STANDARD][narrowest])
  return {kind: {width: {rate: interval(seen[kind][width][rate]) for rate in sorted(seen[kind][width])} for width in sorted(seen[kind])}
          for kind in (STANDARD, MUP, MUON) if kind in seen}


def best(by_rate: dict[float, Interval]) -> float:
  """The rate with the least mean loss."""
  return min(by_rate, key=lambda rate: by_rate[rate][0])


def moves(by_width: dict[int, dict[float, Interval]]) -> float:
  """How far apart the best rates of all widths are, in factors of 2."""
  rates = [best(one) for one in by_width.values()]
  return math.log2(max(rates) / min(rates))


def bracketed(by_rate: dict[float, Interval]) -> bool:
  """Whether lower and higher rates than the best one were tried."""
  return min(by_rate) < best(by_rate) < max(by_rate)


def described(found: Losses) -> str:
  """The tables in Markdown."""
  parts = []
  for kind, by_width in found.items():
    rates = sorted({rate for one in by_width.values() for rate in one})
    cell = lambda one, rate: '' if rate not in one else f'**{told(one[rate])}**' if rate == best(one) else told(one[rate])
    parts.append(table([kind, *(f'{rate:g}' for rate in rates)],
                       [[f'width {width}', *(cell(one, rate) for rate in rates)] for width, one in by_width.items()]))
  rows = []
  for kind, by_width in found.items():
    narrow = best(by_width[min(by_width)])
    lost = lambda one: f'{one[narrow][0] - one[best(one)][0]:.4f}' if narrow in one else 'not run'
    rows.append([kind, *(f'{best(one):g}{"" if bracketed(one) else " (at the edge)"}' for one in by_width.values()),
                 f'{moves(by_width):g}', lost(by_width[max(by_width)])])
  widths = list(next(iter(found.values())))
  parts.append(table(['best rate', *(f'width {width}' for width in widths), 'moves by, in factors of 2',
                      f'lost at width {max(widths)} with the best rate of {min(widths)}'], rows))
  return '\n\n'.join(parts)


def draw(found: Losses, path: Path) -> None:
  """Writes a PNG: the loss over the peak rate, a line per width."""
  figure = Figure(figsize=(9, 3.4), layout='constrained')
  for axes, (kind, by_width) in zip(figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items()):
    for number, (width, one) in enumerate(by_width.items()):
      color = colormaps['viridis'](0.9 * number / max(len(by_width) - 1, 1))
      means = [mean for mean, _ in one.values()]
      axes.plot(list(one), means, 'o-', color=color, markersize=3, linewidth=1, label=f'width {width}')
      axes.plot(best(one), one[best(one)][0], 'v', color='crimson', markersize=7)
    axes.set(xscale='log', xlabel='peak learning rate' if kind != MUON else "Muon's peak learning rate", title=kind)
    rates = sorted({rate for one in by_width.values() for rate in one})
    axes.set_xticks(rates[::2], [f'{rate:g}' for rate in rates[::2]])
    axes.minorticks_off()
    axes.spines[['top', 'right']].set_visible(False)
  figure.axes[0].set_ylabel('validation loss, nats per byte')
  figure.axes[-1].legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  save_figure(figure, path, dpi=100)
