"""Sums with reversed digits, half learned: the start of configs/addition_grpo.py, in a minute on 2 cores.

Set the data, from examples/addition.py: --config.data.source.path=data/addition/train.jsonl. Expected: half of the sums that it has not
seen right after 180 to 260 steps, by seed, and 97 % after 700.
"""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, RopeConfig, SourceConfig,
  TokenizerConfig)


def get_config() -> Config:
  return Config(
    objective=ObjectiveConfig('sft'),
    model=ModelConfig(
      layers=2, heads=4, width=64,
      positions='rope', rope=RopeConfig(theta=100.0),  # a row has 16 tokens
      norm='rmsnorm', mlp='gelu', qk_norm='head', bias=False, tied=False),
    data=DataConfig(
      source=SourceConfig(prompt='prompt', completion='completion'),
      context=16, rows='document',
      valid_fraction=0.01,
      tokenizer=TokenizerConfig(kind='chars')),  # a digit is a token
    optimizer=OptimizerConfig(
      name='muon', muon_lr=0.02, peak_lr=4e-3, schedule='constant', warmup=20, weight_decay=0.0),
    steps=700,
    batch_size=128,
    eval=EvalConfig(every=0, sample_tokens=0),
    checkpoint=CheckpointConfig(every=20, keep=100))  # to go on from the first that is right half the time
