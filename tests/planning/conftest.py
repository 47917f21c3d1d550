"""Recipes that the tests of plans share: a 13B model that is only described, and a tiny one that is compiled."""

import dataclasses

import pytest

from gptjax.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig

LLAMA = {'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'tied': False}
COMPUTE = ComputeConfig(scan=True, remat='full', attention='xla', dtype='bfloat16')


@pytest.fixture
def large():
  """A 13B model in bfloat16, ZeRO stage 3."""
  model = ModelConfig(layers=40, width=5120, heads=40, mlp_width=13824, vocab_size=32000, **LLAMA)
  return Config(model=model, compute=COMPUTE, data=DataConfig(context=4096), steps='1e12 tokens', batch_size=256, zero_stage=3)


@pytest.fixture(scope='session')
def tiny():
  """A model for four devices, data 2 x model 2, ZeRO stage 3."""
  model = ModelConfig(layers=3, width=256, heads=2, mlp_width=512, vocab_size=512, **LLAMA)
  return Config(model=model, compute=COMPUTE, data=DataConfig(context=128), mesh=MeshConfig(data=2, model=2), steps=200, batch_size=8,
                zero_stage=3)


@pytest.fixture
def at_stage():
  """A function (config, stage, **compute): the config at a ZeRO stage, computed in another way."""
  def change(config: Config, stage: int, **compute) -> Config:
    return dataclasses.replace(config, zero_stage=stage, compute=dataclasses.replace(config.compute, **compute))
  return change
