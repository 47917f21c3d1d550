"""The small model of the experiments (experiments/README.md): a modern block on the bytes of the standard library's sources.

Expected: 1.99 nats (2.87 bits) per byte of held-out modules of Python 3.11, in 40 seconds of one core.
"""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, TokenizerConfig)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=2, heads=4, width=64, mlp_width=176,  # a sweep of 24 runs takes less than ten minutes on 2 cores
      positions='rope', norm='rmsnorm', mlp='swiglu', qk_norm='head', bias=False),
    data=DataConfig(
      context=128,
      valid_fraction=0.02,  # scored completely at the end of each run
      tokenizer=TokenizerConfig(kind='bytes')),  # a vocabulary would be most of such a model
    optimizer=OptimizerConfig(peak_lr=5e-3, schedule='linear', final_fraction=0.0, warmup=40, b1=0.9, b2=0.95, weight_decay=0.1),
    steps=400,
    batch_size=8,
    eval=EvalConfig(every=0, sample_tokens=0),
    checkpoint=CheckpointConfig(every=0))
