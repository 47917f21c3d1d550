"""Peak learning rates by width, in factors of 2, for three ways to train: python -m gptjax.sweep --sweep=FILE --out=FOLDER."""

from collections.abc import Sequence

from gptjax.sweeps import Sweep, chain, defaults, product, seeds, values, zipped
from gptjax.sweeps.points import Points

BASE = 64
WIDTHS = (64, 128, 256, 512)
HEAD = 32
"""features per head at every width: muP scales scores otherwise if the size of heads varies"""


def get_sweep() -> Sweep:
  """The small version."""
  points = chain(
    adamw((64,), 4, 8, 16, 32, 64), adamw((128,), 2, 4, 8, 16, 32), adamw((256, 512), 1, 2, 4, 8, 16),
    mup(BASE, (128, 256, 512), 4, 8, 16, 32, 64),  # at the base width muP is the standard parametrization
    muon((64, 128, 256, 512), 4, 8, 16, 32, 64))
  return Sweep('configs/experiment.py', product(points, seeds(1)), overrides=BUDGET)


BUDGET = {'batch_size': 4, 'steps': 100, 'optimizer.warmup': 10, 'data.valid_fraction': 0.004}


def adamw(widths: Sequence[int], *thousandths: float, base: int = 0) -> Points:
  """AdamW at these widths and peak rates, in thousandths."""
  return product(defaults(sizes(widths), model__mup_base=base, optimizer__name='adamw'), values('optimizer.peak_lr', *map(_rate, thousandths)))


def mup(base: int, widths: Sequence[int], *thousandths: float) -> Points:
  """The same with muP."""
  return adamw(widths, *thousandths, base=base)


def muon(widths: Sequence[int], *thousandths: float) -> Points:
  """Muon at these rates for the matrices of blocks; AdamW's for the others stays that of the recipe."""
  return product(defaults(sizes(widths), model__mup_base=0, optimizer__name='muon'), values('optimizer.muon_lr', *map(_rate, thousandths)))


def sizes(widths: Sequence[int]) -> Points:
  """Models of these widths, with heads and feed-forward features in proportion."""
  return zipped(values('model.width', *widths), values('model.heads', *(width // HEAD for width in widths)),
                values('model.mlp_width', *(width * 11 // 4 for width in widths)))


def _rate(thousandths: float) -> float:
  return thousandths / 1000
