"""The smallest model of the scaling law's runs: that of the experiments (configs/experiment.py) on books, a byte per token."""

from gptjax.config import Config, load, override


def get_config() -> Config:
  return override(load('configs/experiment.py'), {
    'data.source.path': 'data/books/train',
    'data.valid_fraction': 0.005,  # of 47 MB; no run is so long that it reads a byte twice
    'batch_size': 2,  # of 128 tokens: in 2e11 FLOPs width 64 comes to 2.22 nats per byte with 2 rows, to 2.54 with 4 and 2.66 with 8
    'model.vocab_size': 259})  # of bytes: parameters are counted without the tokenizer
