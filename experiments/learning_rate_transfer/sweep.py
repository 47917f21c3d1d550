"""Peak learning rates by width, in factors of 2, for three ways to train: python -m gptjax.sweep --sweep=FILE --out=FOLDER."""

from gptjax.sweeps import Sweep, chain, product, seeds, values, zipped
from gptjax.sweeps.points import Points

BASE = 64
WIDTHS = (64, 128, 256, 512)
HEAD = 32
"""features per head at every width: by muP, scores would change with their size"""


def get_sweep() -> Sweep:
  """The small version: 41,000 tokens per run."""
  points = points_of({64: (0.5, 1, 2, 4, 8), 512: (0.125, 0.25, 0.5, 1, 2), 256: (0.25, 0.5, 1, 2, 4), 128: (0.5, 1, 2, 4, 8)},
                     dict.fromkeys((512, 256, 128), (0.5, 1, 2, 4, 8)),  # at the base width, muP is standard
                     dict.fromkeys(WIDTHS, (8, 16, 32, 64)), BASE, HEAD)
  near = points_of({64: (2, 4, 8)}, dict.fromkeys((512, 256, 128), (2, 4, 8)), {}, BASE, HEAD)  # where one seed does not tell rates apart
  return Sweep('configs/experiment.py', chain(product(points, seeds(1)), product(near, values('seed', 1, 2))), overrides={
    'batch_size': 2, 'steps': 160, 'optimizer.warmup': 16, 'optimizer.peak_lr': 0.002, 'data.valid_fraction': 0.004,
    'model.qk_norm': 'none',  # which would make the loss less sensitive to the rate (arXiv:2309.14322)
    'model.tied': False})


Rates = dict[int, tuple[float, ...]]
"""Peak rates in thousandths, by width."""


def points_of(standard: Rates, mup: Rates, muon: Rates, base: int, head: int) -> Points:
  """AdamW in standard parametrization, then with muP, then Muon, whose AdamW for embeddings and head keeps the rate of the recipe; with
  heads of `head` features and a feed-forward layer in proportion."""
  return chain(
    *(product(_model(width, head, 0), values('optimizer.name', 'adamw'), _rates('peak_lr', rates)) for width, rates in standard.items()),
    *(product(_model(width, head, base), values('optimizer.name', 'adamw'), _rates('peak_lr', rates)) for width, rates in mup.items()),
    *(product(_model(width, head, 0), values('optimizer.name', 'muon'), _rates('muon_lr', rates)) for width, rates in muon.items()))


def _model(width: int, head: int, base: int) -> Points:
  return zipped(values('model.width', width), values('model.heads', width // head), values('model.mlp_width', width * 11 // 4),
                values('model.mup_base', base))


def _rates(name: str, thousandths: tuple[float, ...]) -> Points:
  return values(f'optimizer.{name}', *(rate / 1000 for rate in thousandths))
