"""Llama 2 13B.

Sizes and everything else: Llama 2 (arXiv:2307.09288, table 1 and section 2.2).
Expected: 13,015,864,320 parameters. No loss on your own data is published.
Designed for 64 TPU v5p chips (v5p:4x4x4), in the layout that `gptjax.plan --search` finds: 92.6 of 93.1 GiB per chip, 11.7 s per step at
best and 13.9 s if nothing overlaps. Data: your own mixture, in stores made with a tokenizer of at most 32,000 ids (docs/data.md).
"""

from gptjax.config import (
  CheckpointConfig, Component, ComputeConfig, Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, OptimizerConfig, ValidationSet)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=40, heads=40, width=5120, mlp_width=13824,  # 2/3 of 4 * width, rounded up to a multiple of 256
      vocab_size=32000, vocab_multiple=128,
      positions='rope', norm='rmsnorm', mlp='swiglu', bias=False, tied=False),
    compute=ComputeConfig(dtype='bfloat16', scan=True, remat='none'),
    data=DataConfig(
      train=(Component('stores/train'),), valid=(ValidationSet('valid', 'stores/valid'),),
      context=4096, isolate_documents=False),  # the paper does not mention a mask between documents
    optimizer=OptimizerConfig(
      peak_lr=3e-4,
      schedule='cosine', final_fraction=0.1, warmup=2000,
      b1=0.9, b2=0.95, eps=1e-5, weight_decay=0.1, clip=1.0),
    mesh=MeshConfig(data=64),
    zero_stage=2,
    steps='2e12 tokens',
    batch_size=1024,  # 4 million tokens
    microbatches=8,  # 2 sequences per chip at a time
    eval=EvalConfig(every=1000, rows=4096, sample_tokens=0),
    checkpoint=CheckpointConfig(every=1000))
