"""Recipes that the tests of plans share: a 13B model that is only described, and a tiny one that is compiled."""

import copy
import dataclasses

import pytest

from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig

LLAMA = {'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'tied': False, 'scan': True, 'remat': 'full',
         'compute_dtype': 'bfloat16', 'attention': 'xla'}


@pytest.fixture
def large():
  """A 13B model in bfloat16, ZeRO stage 3."""
  model = ModelConfig(layers=40, width=5120, heads=40, mlp_width=13824, vocab_size=32000, **LLAMA)
  return Config(model=model, data=DataConfig(context=4096), steps='1e12 tokens', batch_size=256, zero_stage=3)


@pytest.fixture(scope='session')
def tiny():
  """A model for four devices, data 2 x model 2, ZeRO stage 3."""
  model = ModelConfig(layers=3, width=256, heads=2, mlp_width=512, vocab_size=512, **LLAMA)
  return Config(model=model, data=DataConfig(context=128), mesh=MeshConfig(data=2, model=2), steps=100, batch_size=8, zero_stage=3)


@pytest.fixture
def at_stage():
  """A function (config, stage): the config at a ZeRO stage, also one that training does not offer."""
  def change(config: Config, stage: int, **model) -> Config:
    changed = copy.copy(dataclasses.replace(config, model=dataclasses.replace(config.model, **model)))
    object.__setattr__(changed, 'zero_stage', stage)
    return changed
  return change
