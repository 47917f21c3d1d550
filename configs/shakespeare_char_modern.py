"""The modern recipe at nanoGPT's size: the same 1,536,000 tokens, no more than its 804,096 parameters, on 2 cores.

Give the text: --config.data.files=PATH/input.txt (1,115,394 characters; the first 90 % train).
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, TokenizerConfig


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=4, heads=4, width=128, mlp_width=336,
      positions='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, bias=False),
    data=DataConfig(
      files='input.txt',
      context=256,
      isolate_documents=False,  # the text is one document
      tokenizer=TokenizerConfig(kind='chars')),
    optimizer=OptimizerConfig(
      name='muon', muon_lr=0.02, peak_lr=5e-3, schedule='linear', final_fraction=0.0, warmup=50,
      b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
    steps=2000,
    batch_size=3,
    eval=EvalConfig(every=500, rows=100),
    checkpoint=CheckpointConfig(every=1000))
