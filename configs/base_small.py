"""A small base model for fine-tuning, such as configs/spam_from_base.py: the architecture of default.py, pretrained on books.

Set the data, a folder of text files: --config.data.source.path=FOLDER. Expected, on 47 MB of books from Project Gutenberg: 1.92 bits per
byte of three books that are held out, in 10 minutes of one core.
"""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, TokenizerConfig)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=4, heads=6, width=192, mlp_width=512,  # as in default.py, for a like number of tokens
      positions='rope', norm='rmsnorm', mlp='swiglu', qk_norm='head', bias=False),
    data=DataConfig(
      context=256,  # that of the texts to classify
      valid_fraction=0.02,  # a few books
      tokenizer=TokenizerConfig(kind='bpe', vocab_size=4096)),
    optimizer=OptimizerConfig(  # as in default.py
      name='muon', muon_lr=0.02, peak_lr=5e-3, schedule='linear', final_fraction=0.0, warmup=50, b1=0.9, b2=0.95, weight_decay=0.1),
    steps=1000,  # 2 million tokens, a sixth of the books: what fits the time
    batch_size=8,
    eval=EvalConfig(every=500, rows=64, prompt='She', sample_tokens=60),
    checkpoint=CheckpointConfig(every=0))
