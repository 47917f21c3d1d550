"""The shortest run of the fit with two other seeds, for the spread over seeds.

python -m gptjax.sweep --sweep=experiments/scaling_law/repeated.py --out=sweeps/scaling_law_repeated --workers=2
"""

from experiments.scaling_law.sweep import RECIPE, isoflop, shape
from gptjax.sweeps import Sweep, product, values


def get_sweep() -> Sweep:
  return Sweep(RECIPE, product(isoflop(RECIPE, {2e11: (32,)}, shape), values('seed', 1, 2)))
