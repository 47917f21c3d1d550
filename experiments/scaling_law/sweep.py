"""IsoFLOP runs on books: four budgets of compute, each divided between parameters and tokens in four or five ways.

python -m gptjax.sweep --sweep=experiments/scaling_law/sweep.py --out=sweeps/scaling_law --workers=2
"""

import math
from collections.abc import Callable, Mapping, Sequence

from gptjax.config import load, override
from gptjax.model import flops_per_token
from gptjax.sweeps import Point, Points, Sweep

RECIPE = 'experiments/scaling_law/recipe.py'
BUDGETS = {2e11: (32, 48, 64, 80, 96), 4e11: (32, 48, 64, 80, 96), 8e11: (32, 48, 64, 96, 128), 16e11: (48, 64, 96, 128)}
"""FLOPs of a run, and the widths that divide them."""


def get_sweep() -> Sweep:
  return Sweep(RECIPE, isoflop(RECIPE, BUDGETS, shape))


def shape(width: int) -> Point:
  """A model of two layers with heads of 16, and its learning rate: the recipe's at width 64, falling with the square root of the width."""
  return {'model.width': width, 'model.heads': width // 16, 'model.mlp_width': width * 11 // 4,
          'optimizer.peak_lr': round(5e-3 * math.sqrt(64 / width), 5)}


def isoflop(recipe: str, budgets: Mapping[float, Sequence[int]], shape: Callable[[int], Point], fixed: Point | None = None) -> Points:
  """For each budget and width the steps that the budget pays, of which the first tenth is warmup; `fixed`: fields of all runs."""
  base = override(load(recipe), fixed or {})
  points = []
  for budget, width in ((budget, width) for budget, widths in budgets.items() for width in widths):
    config = override(base, shape(width))
    steps = round(budget / flops_per_token(config.model, config.data.context) / config.data.context / config.batch_size)
    points.append({**shape(width), 'steps': steps, 'optimizer.warmup': steps // 10})
  return points
