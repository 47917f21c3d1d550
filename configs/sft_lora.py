"""Supervised fine-tuning of an imported model of up to a few billion parameters with LoRA on one accelerator.

Set the model and the data as for configs/sft.py: --config.init_from=runs/MODEL --config.data.source.path=FILE.jsonl
--config.data.source.messages=messages --config.data.source.chat=template.
Expected: not trained yet.
"""

from gptjax.config import (
  CheckpointConfig, ComputeConfig, Config, DataConfig, EvalConfig, LoraConfig, ObjectiveConfig, OptimizerConfig)


def get_config() -> Config:
  return Config(
    objective=ObjectiveConfig('sft'),
    lora=LoraConfig(
      rank=16),  # enough for some thousand examples; the base has neither gradients nor optimizer state
    init_from='runs/model',
    compute=ComputeConfig(dtype='bfloat16', scan=True, remat='full'),
    data=DataConfig(context=2048, rows='pack', valid_fraction=0.05),
    optimizer=OptimizerConfig(
      peak_lr=2e-4,  # 10 times that of full fine-tuning: adapters start at 0, and need larger steps
      schedule='cosine', warmup=30, weight_decay=0.0),
    steps='2 epochs',
    batch_size=8, microbatches=8,  # 16,384 tokens per step
    eval=EvalConfig(every='0.5 epochs', sample_tokens=100),
    checkpoint=CheckpointConfig(every='1 epoch', keep=2))
