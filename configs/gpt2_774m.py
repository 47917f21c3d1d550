"""GPT-2 large.

Sizes: GPT-2 (Radford et al., 2019). Rate, warmup, batch and tokens: GPT-3's model of this size (arXiv:2005.14165, table 2.1
and appendix B), since GPT-2's are not published.
Expected: 774,030,080 parameters (and 47 padded rows of the table). The published weights have a loss of 2.67 on
OpenWebText (nanoGPT's README); training on OpenWebText itself gives less.
Designed for 32 GPUs of 40 GB. Data: OpenWebText in stores made with GPT-2's tokenizer (docs/data.md).
"""

from gptjax.config import (
  CheckpointConfig, Component, ComputeConfig, Config, DataConfig, EvalConfig, MeshConfig, ModelConfig, OptimizerConfig, ValidationSet)


def get_config() -> Config:
  return Config(
    model=ModelConfig(
      layers=36, heads=20, width=1280,
      vocab_size=50257, vocab_multiple=128),  # 50304 rows: complete tiles of the matrix units
    compute=ComputeConfig(dtype='bfloat16', scan=True, remat='full'),
    data=DataConfig(
      train=(Component('stores/train'),), valid=(ValidationSet('valid', 'stores/valid'),),
      context=1024,
      isolate_documents=False),  # GPT-2 attends across the documents of a window
    optimizer=OptimizerConfig(
      peak_lr=2.5e-4,
      schedule='cosine', final_fraction=0.1,
      warmup='375e6 tokens',
      b1=0.9, b2=0.95, weight_decay=0.1, clip=1.0),
    mesh=MeshConfig(data=32),
    steps='300e9 tokens',
    batch_size=512,  # half a million tokens
    eval=EvalConfig(every=1000, rows=4096, sample_tokens=0),
    checkpoint=CheckpointConfig(every=1000))
