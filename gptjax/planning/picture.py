"""The memory of plans as stacked bars."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax.config import AXIS_NAMES
from gptjax.planning.estimate import Estimate
from gptjax.planning.memory import Memory
from gptjax.planning.search import settings
from gptjax.sharding.chips import GIB


def draw(plans: Sequence[Estimate], path: Path) -> None:
  """Writes a PNG: one bar per plan with its parts by theory, a mark at the compiled total, and a line at the chip's memory."""
  from matplotlib import colormaps
  from matplotlib.figure import Figure

  figure = Figure(figsize=(max(4.0, 1.6 + 1.1 * len(plans)), 4.8), layout='constrained')
  axes = figure.subplots()
  places = range(len(plans))
  parts = {name: np.array([getattr(one.memory, name) for one in plans]) / GIB for name in Memory.__dataclass_fields__}
  bottom = np.zeros(len(plans))
  for (name, heights), color in zip(parts.items(), colormaps['viridis'](np.linspace(0, 1, len(parts)))):
    axes.bar(places, heights, 0.7, bottom, label=name, color=color)
    bottom = bottom + heights
  compiled = [(place, one.compiled.total / GIB) for place, one in zip(places, plans) if one.compiled]
  if compiled:
    axes.plot(*zip(*compiled), 'k_', markersize=28, label='compiled')
  chip = plans[0].topology.chip.memory / GIB
  axes.axhline(chip, color='crimson', linewidth=1, label=f'{chip:.0f} GiB per device')
  labels = []
  for one in plans:
    chosen = settings(one)
    mesh, work = ' x '.join(str(size) for size in one.sizes.values()), f'{chosen["compute.remat"]}, {chosen["microbatches"]}'
    labels.append(f'{mesh}\nZeRO {chosen["zero_stage"]}\n{work}')
  axes.set_xticks(places, labels, fontsize=8)
  axes.set_xlabel(f'{" x ".join(AXIS_NAMES)}, ZeRO stage, remat and microbatches')
  axes.set_ylabel('GiB per device')
  axes.set_title(f'{plans[0].parameters / 1e9:.1f}B parameters on {plans[0].topology.name}', fontsize=10)
  axes.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  figure.savefig(path, dpi=150)
