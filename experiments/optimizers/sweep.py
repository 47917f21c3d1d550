"""python -m gptjax.sweep --sweep=experiments/optimizers/sweep.py --out=sweeps/optimizers --workers=2"""

from collections.abc import Mapping, Sequence

from gptjax.sweeps import Points, Sweep, chain, product, seeds, values

RATE = {'adamw': 'optimizer.peak_lr', 'muon': 'optimizer.muon_lr', 'lion': 'optimizer.peak_lr'}
"""The field with the rate that is tuned for each optimizer."""
LION = {'optimizer.b1': 0.95, 'optimizer.b2': 0.98, 'optimizer.weight_decay': 0.5}
"""The decays of moments are those of the paper's language models (section 4.4); that of weights is 5 times AdamW's, for smaller rates."""
CURVE = {'eval.every': 25, 'eval.rows': 64}
"""Validation that is frequent enough for the step at which a loss is reached, and takes a tenth of the time."""


def points(rates: Mapping[str, Sequence[float]], best: Mapping[str, float], count: int = 3) -> Points:
  """For each optimizer all rates with one seed, then the best with `count` seeds."""
  def one(name: str, tried: Sequence[float]) -> Points:
    fixed: Points = [{'optimizer.name': name, **(LION if name == 'lion' else {})}]
    return product(fixed, values(RATE[name], *tried))

  return chain(*(product(one(name, tried), seeds(1)) for name, tried in rates.items()),
               *(product(one(name, [rate]), seeds(count)) for name, rate in best.items()))


RATES = {'adamw': (2.5e-3, 5e-3, 1e-2, 2e-2), 'muon': (1e-2, 2e-2, 4e-2, 8e-2), 'lion': (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
BEST = {'adamw': 5e-3, 'muon': 2e-2, 'lion': 2e-3}
TARGETS = (2.4, 2.1)
"""Losses of which the steps are counted, in nats per byte."""


def get_sweep() -> Sweep:
  return Sweep('configs/experiment.py', points(RATES, BEST), overrides=CURVE)
