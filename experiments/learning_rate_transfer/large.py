"""The same for the model of 124 million parameters on accelerators: widths 256 to 2048, tuned at 256."""

from experiments.learning_rate_transfer.sweep import points_of
from gptjax.sweeps import Sweep, product, seeds

BASE = 256


def get_sweep() -> Sweep:
  """The large version."""
  rates = (0.25, 0.5, 1, 2, 4, 8, 16)
  points = points_of(dict.fromkeys((256, 512, 1024, 2048), rates), dict.fromkeys((512, 1024, 2048), rates),
                     dict.fromkeys((256, 512, 1024, 2048), (5, 10, 20, 40, 80)), BASE, head=64)
  return Sweep('configs/gpt2_124m.py', product(points, seeds(1)), overrides={'steps': 5000, 'model.tied': False})
