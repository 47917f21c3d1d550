"""The layouts of sweep.py for Llama 2 7B on the 64 chips of v5p:4x4x4, which `measure.py --topology=v5p:4x4x4` plans."""

from experiments.parallelism.sweep import layouts
from gptjax.sweeps import Sweep

LAYOUTS = layouts(8, 8, expert_width=2752)  # two of the 16 experts of a token have half the width of the dense layer


def get_sweep() -> Sweep:
  return Sweep('configs/llama_7b.py', list(LAYOUTS.values()), overrides={'zero_stage': 1, 'microbatches': 16})
