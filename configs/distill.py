"""Distillation of an imported model into a smaller one of its family (Llama 3.1 8B into 3.2 1B, Qwen 3 4B into 0.6B) on one accelerator.

Import both with tools.import_hf. Set the small one, the teacher and the data: --config.init_from=runs/SMALL
--config.objective.teacher=runs/LARGE --config.data.source.path=FILE.jsonl --config.data.source.messages=messages
--config.data.source.chat=template. Expected: not trained yet.
"""

from gptjax.config import (
  CheckpointConfig, ComputeConfig, Config, DataConfig, EvalConfig, ObjectiveConfig, OptimizerConfig)


def get_config() -> Config:
  return Config(
    objective=ObjectiveConfig('distillation', teacher='runs/teacher'),
    compute=ComputeConfig(dtype='bfloat16', scan=True, remat='full'),
    data=DataConfig(context=2048, rows='pack', valid_fraction=0.05),
    optimizer=OptimizerConfig(peak_lr=2e-5, schedule='cosine', warmup=30, weight_decay=0.0),
    steps='2 epochs',
    batch_size=8, microbatches=8,  # 16,384 tokens per step
    eval=EvalConfig(every='0.5 epochs', sample_tokens=100),
    checkpoint=CheckpointConfig(every='1 epoch', keep=2))
