"""The same question on accelerators: GPT-2's block and tokenizer, four budgets from 1e18 to 8e18 FLOPs.

python -m gptjax.sweep --sweep=experiments/scaling_law/large.py --out=sweeps/scaling_law_large
"""

import math

from experiments.scaling_law.sweep import isoflop
from gptjax.sweeps import Point, Sweep

RECIPE = 'configs/gpt2_124m.py'  # its data: stores with GPT-2's tokenizer
ROWS = {'batch_size': 256, 'microbatches': 2, 'optimizer.final_fraction': 0.0}
BUDGETS = {1e18: (320, 448, 576, 768), 2e18: (320, 448, 576, 768), 4e18: (448, 576, 768, 1024), 8e18: (576, 768, 1024, 1280)}


def get_sweep() -> Sweep:
  return Sweep(RECIPE, isoflop(RECIPE, BUDGETS, shape, ROWS), overrides=ROWS)


def shape(width: int) -> Point:
  """As deep as GPT-2 is for its width, with heads of 64, and the rate of the smallest GPT-2 at its width."""
  return {'model.width': width, 'model.heads': width // 64, 'model.layers': width // 64,
          'optimizer.peak_lr': round(6e-4 * math.sqrt(768 / width), 6)}
