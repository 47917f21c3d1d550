"""Three learning rates at two widths, from which sweep.RATE was chosen.

python -m gptjax.sweep --sweep=experiments/scaling_law/rates.py --out=sweeps/scaling_law_rates --workers=2
"""

from experiments.scaling_law.sweep import RECIPE, isoflop, shape
from gptjax.sweeps import Sweep


def get_sweep() -> Sweep:
  points = isoflop(RECIPE, {1e11: (32, 64)}, shape)
  return Sweep(RECIPE, [{**point, 'optimizer.peak_lr': round(factor * point['optimizer.peak_lr'], 5)} for point in points
                        for factor in (0.5, 1, 2)])
