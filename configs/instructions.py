"""Supervised fine-tuning of a small base model on a JSON list of records with instruction, input and output, in minutes on 2 cores.

The base is runs/base, of configs/base_small.py. Set the data: --config.data.source.path=FILE.json. LoRA needs more steps:
--config.lora.rank=64 --config.lora.alpha=128 --config.batch_size=4 --config.steps='6 epochs'.
Expected: 3.20 nats per token of held-out answers (the base: 5.79), and answers that end by themselves; they have the form of answers, and
rarely the right content.
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, ObjectiveConfig, OptimizerConfig, SourceConfig


def get_config() -> Config:
  return Config(
    objective=ObjectiveConfig('sft'),
    init_from='runs/base',
    data=DataConfig(
      source=SourceConfig(
        prompt='{instruction}\\n{input}', completion='output',
        chat='plain'),  # the run can be talked to: generate --chat
      valid_fraction=0.0555,  # 55 of 990 records
      context=256, rows='pack'),  # five records per row
    optimizer=OptimizerConfig(
      peak_lr=3e-3,  # the base has read only books and must change much; 1e-3 is 0.2 nats worse
      schedule='linear', final_fraction=0.0, warmup=20, weight_decay=0.1),
    steps='4 epochs',  # about 100 steps
    batch_size=8,
    eval=EvalConfig(every='1 epoch', prompt='Rewrite the sentence in the past tense.\\nShe walks home.', sample_tokens=40),
    checkpoint=CheckpointConfig(every=0))
