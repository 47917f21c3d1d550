"""The same comparison at the size of GPT-2's smallest, for 20 tokens per parameter: a run is about an hour of 8 A100s.

python -m gptjax.sweep --sweep=experiments/optimizers/large.py --out=sweeps/optimizers_large
"""

from experiments.optimizers.sweep import points
from gptjax.sweeps import Sweep

RATES = {'adamw': (3e-4, 6e-4, 1.2e-3, 2.4e-3), 'muon': (5e-3, 1e-2, 2e-2, 4e-2), 'lion': (5e-5, 1e-4, 2e-4, 4e-4)}
BEST = {'adamw': 1.2e-3, 'muon': 2e-2, 'lion': 2e-4}
"""A guess: to be replaced by what the rates show."""


def get_sweep() -> Sweep:
  return Sweep('configs/gpt2_124m.py', points(RATES, BEST),
               overrides={'steps': '2.5e9 tokens', 'optimizer.warmup': 500, 'eval.every': 250, 'eval.rows': 1024})
