"""Two runs of the sweep with other seeds, for the spread over seeds.

python -m gptjax.sweep --sweep=experiments/scaling_law/repeated.py --out=sweeps/scaling_law_repeated --workers=2
"""

from experiments.scaling_law import sweep
from gptjax.sweeps import Sweep, product, values


def get_sweep() -> Sweep:
  found = sweep.get_sweep()
  return Sweep(found.recipe, product([point for point in found.points if point['steps'] in (779, 799)], values('seed', 1, 2)))
