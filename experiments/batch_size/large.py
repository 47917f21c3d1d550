"""The same comparison at the size of GPT-2's smallest, for 20 tokens per parameter: a run is about an hour of 8 A100s.

python -m gptjax.sweep --sweep=experiments/batch_size/large.py --out=sweeps/batch_size_large --train_flags=--log_every=10
"""

from experiments.batch_size.sweep import budget, points
from gptjax.sweeps import Sweep


def get_sweep() -> Sweep:
  batches = 160, 320, 640, 1280, 2560  # rows of 1024 tokens, in 20 microbatches on 8 devices
  return Sweep('configs/gpt2_124m.py', points(batches, 6e-4, at=480), overrides=budget(2_500_000_000) | {'microbatches': 20})
