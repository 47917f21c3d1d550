"""The memory of plans as stacked bars."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gptjax.config import AXIS_NAMES
from gptjax.planning.estimate import Estimate
from gptjax.planning.memory import Memory
from gptjax.planning.search import settings
from gptjax.sharding.chips import GIB


def draw(plans: Sequence[Estimate], path: Path) -> None:
  """Writes a PNG: a bar a plan, cut into its parts by theory, a mark where the compiler puts it, the chip's memory as a line."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot

  names = [field.name for field in dataclasses.fields(Memory)]
  figure, axes = pyplot.subplots(figsize=(max(4.0, 1.6 + 1.1 * len(plans)), 4.8), layout='constrained')
  places = list(range(len(plans)))
  bottom = [0.0] * len(plans)
  for index, name in enumerate(names):
    heights = [getattr(one.memory, name) / GIB for one in plans]
    axes.bar(places, heights, 0.7, bottom, label=name, color=pyplot.get_cmap('viridis')(index / (len(names) - 1)))
    bottom = [low + height for low, height in zip(bottom, heights)]
  compiled = [(place, one.compiled.total / GIB) for place, one in zip(places, plans) if one.compiled]
  if compiled:
    axes.plot(*zip(*compiled), 'k_', markersize=28, label='compiled')
  chip = plans[0].topology.chip.memory / GIB
  axes.axhline(chip, color='crimson', linewidth=1, label=f'{chip:.0f} GiB a device')
  labels = []
  for one in plans:
    chosen = settings(one)
    mesh, work = ' x '.join(str(size) for size in one.sizes.values()), f'{chosen["compute.remat"]}, {chosen["microbatches"]}'
    labels.append(f'{mesh}\nZeRO {chosen["zero_stage"]}\n{work}')
  axes.set_xticks(places, labels, fontsize=8)
  axes.set_xlabel(f'{" x ".join(AXIS_NAMES)}, ZeRO stage, remat and microbatches')
  axes.set_ylabel('GiB a device')
  axes.set_title(f'{plans[0].parameters / 1e9:.1f}B parameters on {plans[0].topology.name}', fontsize=10)
  axes.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  figure.savefig(path, dpi=150)
  pyplot.close(figure)
