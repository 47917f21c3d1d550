"""OLMoE 1B-7B (arXiv:2409.02060): 64 experts in every layer, of which each token uses 8.

Sizes, rates, batch, weights of losses and number of tokens are the paper's. It initializes by a truncated normal distribution; here it is
not truncated. Its balance loss is over the tokens of a device; here it is over each row.
Expected: 6,919,161,856 parameters, of which a token uses 1,282,017,280.
Designed for 64 TPU v5p chips (v5p:4x4x4): by the plan 8 GiB per chip, and the products take 1.4 s of a step at best. Data: your own
mixture, in stores made with a tokenizer of at most 50,304 ids (docs/data.md).
"""

from gptjax.config import (
  CheckpointConfig, Component, ComputeConfig, Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, OptimizerConfig, RouterConfig,
  ValidationSet)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=16, heads=16, width=2048,
      experts=64, experts_per_token=8, expert_width=1024,  # many small experts: more combinations of the same active size
      router=RouterConfig(normalized=False, balance_loss=0.01, z_loss=0.001),
      vocab_size=50304, vocab_multiple=128,
      positions='rope', norm='rmsnorm', mlp='swiglu', qk_norm='width', bias=False, tied=False),
    compute=ComputeConfig(dtype='bfloat16', scan=True, remat='full'),
    data=DataConfig(
      train=(Component('stores/train'),), valid=(ValidationSet('valid', 'stores/valid'),),
      context=4096),
    optimizer=OptimizerConfig(
      peak_lr=4e-4,
      schedule='cosine', final_fraction=0.125, warmup=2500,
      b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
    mesh=MeshConfig(data=64),  # plain ZeRO: its 0.36 s of traffic fit behind the products, as would the 0.21 s with mesh.expert=4
    zero_stage=3,
    steps='5.1e12 tokens',
    batch_size=1024,  # 4 million tokens
    microbatches=4,  # 4 sequences per chip at a time
    eval=EvalConfig(every=1000, rows=4096, sample_tokens=0),
    checkpoint=CheckpointConfig(every=1000))
