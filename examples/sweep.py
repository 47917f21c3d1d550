"""A sweep for a first look, in two minutes on 2 cores: learning rates of a small model, each with two seeds.

python -m gptjax.sweep --sweep=examples/sweep.py --out=sweeps/first --workers=2
"""

from gptjax.sweeps import Sweep, product, seeds, values


def get_sweep() -> Sweep:
  return Sweep(
    'configs/default.py',
    product(values('optimizer.peak_lr', 1e-3, 3e-3, 1e-2), seeds(2)),
    overrides={
      'optimizer.name': 'adamw', 'model.layers': 1, 'model.width': 48, 'model.heads': 3, 'model.mlp_width': 128,
      'data.tokenizer.kind': 'bytes', 'steps': 60, 'optimizer.warmup': 10, 'eval.every': 20, 'eval.rows': 16, 'eval.sample_tokens': 0,
      'checkpoint.every': 20})
