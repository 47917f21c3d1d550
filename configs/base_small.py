"""A base model of 2.6 million parameters for fine-tuning, pretrained on books in at most 15 minutes on 2 cores.

Set the data, a folder of text files: --config.data.source.path=FOLDER.
"""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, TokenizerConfig)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=4, heads=6, width=192, mlp_width=512,  # as in default.py, for a like number of tokens
      positions='rope', norm='rmsnorm', mlp='swiglu', qk_norm='head', bias=False),
    data=DataConfig(
      context=256,
      valid_fraction=0.02,
      tokenizer=TokenizerConfig(kind='bpe', vocab_size=4096)),
    optimizer=OptimizerConfig(
      name='muon', muon_lr=0.02, peak_lr=5e-3, schedule='linear', final_fraction=0.0, warmup=50, b1=0.9, b2=0.95, weight_decay=0.1),
    steps=1000,
    batch_size=8,
    eval=EvalConfig(every=500, rows=64, prompt='She', sample_tokens=60),
    checkpoint=CheckpointConfig(every=0))
