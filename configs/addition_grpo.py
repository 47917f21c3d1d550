"""Reinforcement from a verifiable reward at its smallest: sums with reversed digits, rewarded if they are exactly right.

Set the data and the start, a checkpoint of configs/addition_sft.py that is right about half the time:
--config.data.source.path=data/addition/train.jsonl --config.init_from=runs/addition/checkpoints/STEP. Expected, for 3 seeds: the
fraction of sampled answers to 2,500 unseen sums that are right goes from 0.30, 0.32 and 0.41 to 0.55, 0.65 and 0.73, in 50 CPU-seconds.
"""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ObjectiveConfig, OptimizerConfig, Reward, SourceConfig)


def get_config() -> Config:
  return Config(
    objective=ObjectiveConfig(
      'grpo', loss='dr_grpo',  # no division by the spread of a group or the length of a completion
      rewards=(Reward('exact'),), group=16, max_tokens=5),  # four digits and the end
    data=DataConfig(
      source=SourceConfig(prompt='prompt', completion='completion'),
      context=16, rows='document', valid_fraction=0.01),
    optimizer=OptimizerConfig(
      name='muon', muon_lr=0.002, peak_lr=4e-4,  # a tenth of those before
      schedule='constant', warmup=5, weight_decay=0.0),
    steps=200,
    batch_size=512,  # 32 prompts
    eval=EvalConfig(every=50, sample_tokens=0),
    checkpoint=CheckpointConfig(every=0))
