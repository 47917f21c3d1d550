"""A modern GPT at the size of nanoGPT's CPU recipe: the same 1,536,000 tokens, at most its 804,096 parameters, on 2 cores.

Set the text file: --config.data.source.path=PATH/input.txt (1,115,394 characters; the first 90 % train).
Expected: 1.536 nats per character over the full validation split, in 2 to 3 minutes (nanoGPT's recipe: 1.90).
"""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, SourceConfig,
  TokenizerConfig)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=4, heads=4, width=128,
      mlp_width=336,  # three matrices of this size have as many parameters as two of 4 * width
      positions='rope', norm='rmsnorm', mlp='swiglu', qk_norm='head', bias=False),
    data=DataConfig(
      source=SourceConfig('input.txt'),
      context=256,  # rotary positions cost no parameters, and longer rows give more context to each character
      isolate_documents=False,  # the text is one document
      tokenizer=TokenizerConfig(kind='chars')),
    optimizer=OptimizerConfig(
      name='muon', muon_lr=0.02, peak_lr=5e-3,  # embeddings and gains tolerate a higher rate than matrices do under AdamW
      schedule='linear', final_fraction=0.0,  # decays to zero
      warmup=50, b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
    steps=2000,
    batch_size=3,  # 768 characters per step, as 12 rows of 64
    eval=EvalConfig(every=500, rows=100),
    checkpoint=CheckpointConfig(every=1000))
