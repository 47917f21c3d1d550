"""Distillation at its smallest: half learned sums with reversed digits are learned from a better model, on the model's own answers.

The start and the teacher are checkpoints of configs/addition_sft.py in runs/addition, as docs/finetuning.md makes them; the data is that of
examples/addition.py. Expected, for 3 seeds: the fraction of sampled answers to 2,500 unseen sums
that are right goes from 0.31, 0.31 and 0.40 to 0.79, 0.84 and 0.91 (the teacher: 0.95, 0.94 and 0.98), in 30 CPU-seconds.
"""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ObjectiveConfig, OptimizerConfig, SourceConfig)


def get_config() -> Config:
  return Config(
    objective=ObjectiveConfig(
      'distillation', teacher='runs/addition',
      loss='reverse_kl', own_samples=True,  # what the model writes shall be likely for the teacher
      max_tokens=5),  # four digits and the end
    init_from='runs/addition/checkpoints/180',
    data=DataConfig(
      source=SourceConfig('data/addition/train.jsonl', prompt='prompt', completion='completion'),
      context=16, rows='document', valid_fraction=0.01),
    optimizer=OptimizerConfig(
      name='muon', muon_lr=0.005, peak_lr=1e-3,  # a quarter of those before
      schedule='linear', final_fraction=0.0, warmup=5, weight_decay=0.0),
    steps=200,
    batch_size=128,
    eval=EvalConfig(every=50, sample_tokens=0),
    checkpoint=CheckpointConfig(every=0))
