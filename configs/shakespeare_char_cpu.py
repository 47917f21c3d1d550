"""nanoGPT's CPU recipe: a GPT-2 of 0.8M parameters on Tiny Shakespeare by characters, in about a minute on 2 cores.

Set the text file: --config.data.source.path=PATH/input.txt (1,115,394 characters; the first 90 % train).
Expected: 1.90 nats per character over the full validation split (nanoGPT itself: 1.898, 1.903, 1.913 over 3 seeds).
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, SourceConfig, TokenizerConfig


def get_config() -> Config:
  return Config(
    model=ModelConfig(layers=4, heads=4, width=128, bias=False),
    data=DataConfig(
      source=SourceConfig('input.txt'),
      context=64,
      isolate_documents=False,  # the text is one document
      tokenizer=TokenizerConfig(kind='chars')),
    optimizer=OptimizerConfig(
      peak_lr=1e-3,  # small networks tolerate a high rate
      final_fraction=0.1, warmup=100,
      b1=0.9, b2=0.99,  # longer averages, since a step has only 768 tokens
      weight_decay=0.1, clip=1.0),
    steps=2000,
    batch_size=12,
    eval=EvalConfig(every=500, rows=200),
    checkpoint=CheckpointConfig(every=1000))
