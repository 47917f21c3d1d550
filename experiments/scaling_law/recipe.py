"""The model of the scaling law's runs: that of the experiments (configs/experiment.py) on books, a byte per token."""

from gptjax.config import Config, load, override


def get_config() -> Config:
  return override(load('configs/experiment.py'), {
    'data.source.path': 'data/books/train',
    'data.valid_fraction': 0.005,  # 240 kB of 47 MB; no run is so long that it reads a byte twice
    'model.vocab_size': 259})  # of bytes: models are counted without a tokenizer
