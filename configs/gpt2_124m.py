"""GPT-2's smallest model, as nanoGPT trains it.

Sizes: GPT-2 (Radford et al., 2019). Optimizer, batch and tokens: nanoGPT's config/train_gpt2.py, whose rate is GPT-3's for this size
(arXiv:2005.14165, table 2.1).
Expected: 124,439,808 parameters (and 47 padded rows of the table). Loss 2.85 on OpenWebText (nanoGPT's README); the published
weights have 3.12 there.
Designed for 8 GPUs of 40 GB: about 4 days on A100s. Data: OpenWebText in stores made with GPT-2's tokenizer (docs/data.md).
"""

from gptjax.config import (
  CheckpointConfig, Component, ComputeConfig, Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, OptimizerConfig, ValidationSet)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=12, heads=12, width=768,
      vocab_size=50257, vocab_multiple=128),  # 50304 rows: complete tiles of the matrix units
    compute=ComputeConfig(dtype='bfloat16', scan=True, remat='dots'),
    data=DataConfig(
      train=(Component('stores/train'),), valid=(ValidationSet('valid', 'stores/valid'),),
      context=1024,
      isolate_documents=False),  # GPT-2 attends across the documents of a window
    optimizer=OptimizerConfig(
      peak_lr=6e-4,
      schedule='cosine', final_fraction=0.1,
      warmup=2000,
      b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
    mesh=MeshConfig(data=8),
    steps='300e9 tokens',
    batch_size=480,  # 491,520 tokens
    microbatches=5,  # 12 sequences per device at a time, as nanoGPT
    eval=EvalConfig(every=1000, rows=4096, sample_tokens=0),
    checkpoint=CheckpointConfig(every=1000))
