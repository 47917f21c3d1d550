"""The default job: a small modern GPT on the standard library's sources, in minutes on 2 cores."""

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, TokenizerConfig


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=4, heads=6, width=192, mlp_width=512,
      positions='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, bias=False),
    data=DataConfig(
      context=256,
      valid_fraction=0.1,
      tokenizer=TokenizerConfig(kind='bpe', vocab_size=4096)),
    optimizer=OptimizerConfig(
      name='muon', muon_lr=0.02, peak_lr=5e-3, schedule='linear', final_fraction=0.0, warmup=50,
      b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
    steps=700,
    batch_size=8,
    eval=EvalConfig(every=175, rows=64, prompt='def'),  # no space at its end: a space belongs to the next token
    checkpoint=CheckpointConfig(every=350))
