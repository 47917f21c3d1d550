"""Supervised fine-tuning at its smallest: a model of 0.6 million parameters that answers questions about sums, in minutes on 2 cores.

The data is examples/sums.py, so it runs in a folder that has it. Expected: the right answer to 200 of 200 sums that it has not seen
(without the working in the answers: 21 of 200).
"""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, SourceConfig, TokenizerConfig)


def get_config() -> Config:
  return Config(
    objective=ObjectiveConfig('sft'),
    model=ModelConfig(
      layers=3, heads=4, width=128, mlp_width=336,
      positions='rope', norm='rmsnorm', mlp='swiglu', qk_norm='head', bias=False),
    data=DataConfig(
      source=SourceConfig(
        'tfds:examples.sums:Sums', messages='messages',
        chat='plain'),  # the tokenizer has no template of its own
      context=512, rows='pack',  # three conversations per row, with little padding
      tokenizer=TokenizerConfig(kind='bytes')),  # a digit is a token
    optimizer=OptimizerConfig(name='muon', muon_lr=0.02, peak_lr=5e-3, schedule='linear', final_fraction=0.0, warmup=50, weight_decay=0.1),
    steps=1000,
    batch_size=4,
    eval=EvalConfig(every=250, prompt='Add 12 and 34.', sample_tokens=30),
    checkpoint=CheckpointConfig(every=500))
