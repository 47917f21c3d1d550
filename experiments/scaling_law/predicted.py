"""The run whose loss the law predicts: 2.2 times the parameters of the largest model that it is fitted to, and a million tokens.

python -m gptjax.sweep --sweep=experiments/scaling_law/predicted.py --out=sweeps/scaling_law_predicted
"""

from experiments.scaling_law.sweep import RECIPE, shape
from gptjax.sweeps import Sweep

STEPS = 976


def get_sweep() -> Sweep:
  return Sweep(RECIPE, [{**shape(144), 'steps': STEPS, 'optimizer.warmup': STEPS // 10}])
