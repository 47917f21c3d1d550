"""The same models at the size of GPT-2's smallest, for 20 tokens per parameter: a trial is about an hour of 8 A100s.

python -m gptjax.sweep --sweep=experiments/modern_block/large.py --out=sweeps/modern_block_large
"""

from experiments.modern_block.sweep import choices, points, variants
from gptjax.sweeps import Sweep


def get_sweep() -> Sweep:
  models = variants(choices(mlp_width=2048, kv_heads=4), (6e-4, 6e-4))  # the recipe's; the sweep has their halves and doubles
  return Sweep('configs/gpt2_124m.py', points(models, count=3),
               overrides={'steps': '2.5e9 tokens', 'optimizer.warmup': 500, 'data.isolate_documents': True})
