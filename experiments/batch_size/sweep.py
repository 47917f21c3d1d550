"""python -m gptjax.sweep --sweep=experiments/batch_size/sweep.py --out=sweeps/batch_size --workers=2 --train_flags=--log_every=1"""

from collections.abc import Sequence

from gptjax.sweeps import Points, Sweep, chain, product, seeds, values

BATCHES = (2, 4, 8, 16, 32)
"""Rows of 128 tokens."""
TOKENS = 204_800
"""Of every run: 200 steps of 8 rows."""
RATE = 5e-3
"""At 8 rows: the best of the recipe in experiments/optimizers."""


def rate(rows: int, base: float, at: int) -> float:
  """The rule for Adam: it grows with the square root of the batch (arXiv:2205.10287)."""
  return float(f'{base * (rows / at)**0.5:.3g}')


def points(batches: Sequence[int], base: float, at: int, count: int = 3) -> Points:
  """Every batch size at the rate of the rule, which is `base` for `at` rows, with `count` seeds; the first and the last also at half and
  twice that rate."""
  def one(rows: int, *factors: float) -> Points:
    return product(values('batch_size', rows), values('optimizer.peak_lr', *(factor * rate(rows, base, at) for factor in factors)))

  return chain(*(product(one(rows, 1.0), seeds(count)) for rows in batches),
               *(product(one(rows, 0.5, 2.0), seeds(1)) for rows in (batches[0], batches[-1])))


def budget(tokens: int) -> dict[str, object]:
  """Overrides for runs of equal tokens, a tenth of them warmup, whose steps measure the gradient noise between two halves of the batch."""
  return {'steps': f'{tokens} tokens', 'optimizer.warmup': f'{tokens // 10} tokens', 'microbatches': 2, 'gradient_noise': True}


def get_sweep() -> Sweep:
  return Sweep('configs/experiment.py', points(BATCHES, RATE, at=8), overrides=budget(TOKENS))
