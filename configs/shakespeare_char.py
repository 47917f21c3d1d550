"""nanoGPT's GPU recipe: a GPT-2 of 10.7M parameters on Tiny Shakespeare by characters.

Set the text file: --config.data.source.path=PATH/input.txt (1,115,394 characters; the first 90 % train).
Expected on a GPU: best validation loss at most 1.48 nats per character (nanoGPT publishes 1.4697 on sampled batches); it
overfits after that, so the best checkpoint is kept: evaluate it with --step=best.
"""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, SourceConfig, TokenizerConfig)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=6, heads=6, width=384, bias=False,
      dropout=0.2),  # 10 times more parameters than characters: it would memorize the text
    data=DataConfig(
      source=SourceConfig('input.txt'),
      context=256,
      isolate_documents=False,  # the text is one document
      tokenizer=TokenizerConfig(kind='chars')),
    optimizer=OptimizerConfig(
      peak_lr=1e-3,  # small networks tolerate a high rate
      final_fraction=0.1, warmup=100,
      b1=0.9, b2=0.99,  # longer averages, since a step has few tokens
      weight_decay=0.1, clip=1.0),
    steps=5000,
    batch_size=64,
    eval=EvalConfig(every=250),
    checkpoint=CheckpointConfig(every=250, keep_best=True))
