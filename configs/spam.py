"""Classification of texts: spam."""

from gptjax.config import (
  CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, SourceConfig, TokenizerConfig)


def get_config() -> Config:
  return Config(
    objective=ObjectiveConfig('classification'),
    model=ModelConfig(
      layers=1, heads=4, width=64, mlp_width=128, positions='rope', norm='rmsnorm', mlp='swiglu', qk_norm='head', bias=False, dropout=0.2),
    data=DataConfig(
      source=SourceConfig(label='label', labels=('ham', 'spam')),
      valid_fraction=0.125,
      context=256, rows='pack',
      tokenizer=TokenizerConfig(kind='bpe', vocab_size=1024)),
    optimizer=OptimizerConfig(peak_lr=3e-3, schedule='linear', final_fraction=0.0, warmup=20, weight_decay=0.1),
    steps='20 epochs',
    batch_size=8,
    eval=EvalConfig(every='2 epochs'),
    checkpoint=CheckpointConfig(every=0))
