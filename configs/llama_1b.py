"""Llama 3.2 1B: its sizes, trained from scratch on a compute-optimal number of tokens.

Sizes: the published model (Meta, 2024), without its RoPE scaling for contexts above 8192. Its own training, pruning
and distillation from 8B, is not published in detail: rate and batch are GPT-3's for this size (arXiv:2005.14165, table 2.1), tokens
20 per parameter (Chinchilla, arXiv:2203.15556), the rest Llama 3's (arXiv:2407.21783, section 3.4).
Expected: 1,235,814,400 parameters. There is no comparable published loss.
Designed for 16 TPU v5e chips (v5e:4x4), in the layout that `gptjax.plan --search` finds: 15.6 of 15.7 GiB per chip, 2.8 s per step at
best and 3.5 s if nothing overlaps. Data: your own mixture, in stores made with a tokenizer of at most 128,256 ids (docs/data.md).
"""

from gptjax.config import (
  CheckpointConfig, Component, ComputeConfig, Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeConfig,
  ValidationSet)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=16, heads=32, kv_heads=8, width=2048, mlp_width=8192,
      vocab_size=128256, vocab_multiple=128,
      positions='rope', rope=RopeConfig(theta=500000.0), norm='rmsnorm', mlp='swiglu', bias=False, tied=True),
    compute=ComputeConfig(dtype='bfloat16', scan=True, remat='dots'),
    data=DataConfig(
      train=(Component('stores/train'),), valid=(ValidationSet('valid', 'stores/valid'),),
      context=4096),  # attention stays inside documents, as in Llama 3
    optimizer=OptimizerConfig(
      peak_lr=2e-4,
      schedule='cosine', final_fraction=0.1, warmup=2000,
      b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
    mesh=MeshConfig(data=16),
    zero_stage=3,
    steps='25e9 tokens',
    batch_size=256,  # a million tokens
    microbatches=4,  # 4 sequences per chip at a time
    eval=EvalConfig(every=1000, rows=4096, sample_tokens=0),
    checkpoint=CheckpointConfig(every=1000))
