"""python -m gptjax.sweep --sweep=experiments/batch_size/sweep.py --out=sweeps/batch_size --workers=2 --train_flags=--log_every=1"""

from collections.abc import Mapping, Sequence

from gptjax.sweeps import Points, Sweep, chain, product, seeds, values

TOKENS = 204_800
"""Of every run: 200 steps of the recipe's batches."""


def points(rates: Mapping[int, Sequence[float]], best: Mapping[int, float], count: int = 3) -> Points:
  """For each batch size all rates with one seed, then the best with `count` seeds."""
  def one(rows: int, tried: Sequence[float]) -> Points:
    return product(values('batch_size', rows), values('optimizer.peak_lr', *tried))

  return chain(*(product(one(rows, tried), seeds(1)) for rows, tried in rates.items()),
               *(product(one(rows, [rate]), seeds(count)) for rows, rate in best.items()))


def budget(tokens: int) -> dict[str, object]:
  """Overrides for runs of equal tokens, a tenth of them warmup, whose steps measure the gradient noise between two halves of the batch."""
  return {'steps': f'{tokens} tokens', 'optimizer.warmup': f'{tokens // 10} tokens', 'microbatches': 2, 'gradient_noise': True}


RATES = {2: (1.25e-3, 2.5e-3, 5e-3), 4: (2.5e-3, 5e-3, 1e-2), 8: (2.5e-3, 5e-3, 1e-2), 16: (2.5e-3, 5e-3, 1e-2), 32: (5e-3, 1e-2, 2e-2)}


def get_sweep() -> Sweep:
  return Sweep('configs/experiment.py', points(RATES, {}), overrides=budget(TOKENS))
