"""Llama 3.2 1B at 131,072 tokens: the end of its pre-training, on long documents.

Sizes and RoPE scaling: the published model (Meta, 2024). Llama 3 spends some of its last tokens at the complete context (arXiv:2407.21783,
section 3.4.2), on documents that fill it: start from a trained model, with --config.init_from=WORKDIR. Rate and tokens are our choice.
Expected: 1,235,814,400 parameters. There is no comparable published loss.
Designed for 8 TPU v5p chips (v5p:2x2x2) that share each row: what remat 'dots' keeps of a row does not fit one chip, and an eighth of
it leaves room. Data: your own mixture of long documents, with a tokenizer of at most 128,256 ids (docs/data.md).
"""

from gptjax.config import (
  CheckpointConfig, Component, ComputeConfig, Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, OptimizerConfig, RopeConfig,
  ValidationSet)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=16, heads=32, kv_heads=8, width=2048, mlp_width=8192,
      vocab_size=128256, vocab_multiple=128,
      positions='rope', rope=RopeConfig(theta=500000.0, scaling='llama3', factor=32.0),
      norm='rmsnorm', mlp='swiglu', bias=False, tied=True),
    compute=ComputeConfig(
      dtype='bfloat16', scan=True, remat='dots',  # products are not computed twice, since their results fit
      context_attention='ring'),  # attention of a chunk takes longer than the next one travels
    data=DataConfig(
      train=(Component('stores/long_train'),), valid=(ValidationSet('valid', 'stores/long_valid'),),
      context=131072, rows='pack'),  # a row is few documents, each complete
    optimizer=OptimizerConfig(
      peak_lr=2e-5,  # a tenth of llama_1b's
      schedule='linear', final_fraction=0.0, warmup=20,
      b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
    mesh=MeshConfig(data=1, context=8),
    steps='1e9 tokens',
    batch_size=8,  # a million tokens, as llama_1b
    microbatches=8,  # one row at a time
    eval=EvalConfig(every=100, rows=64, sample_tokens=0),
    checkpoint=CheckpointConfig(every=100))
