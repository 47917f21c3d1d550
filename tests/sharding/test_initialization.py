"""A model too large for one device can be made: under ZeRO stage 3 initialization creates shards only."""

import math

import jax
import pytest
from tiers import full

from gptjax.config import ComputeConfig, ModelConfig, OptimizerConfig
from gptjax.model import abstract_model
from gptjax.training import abstract, initializer, make_optimizer


@pytest.mark.parametrize('mesh, scan', [full('8x1', False), full('8x1', True), ('4x2', True)], indirect=['mesh'])
def test_no_complete_state_is_made_under_stage_3(mesh, scan):
  described = abstract_model(ModelConfig(layers=2, width=128, heads=4, vocab_size=4096), ComputeConfig(scan=scan), 128)
  optimizer = make_optimizer(OptimizerConfig())
  initialize = initializer(described, optimizer, 3, mesh, seed=0)
  memory = initialize.lower().compile().memory_analysis()  # of one device
  model = sum(4 * math.prod(shape.shape) for shape in described.shapes.values())
  assert model > 3e6
  # Parameters and AdamW's two moments, an eighth of each; small parameters are complete.
  assert memory.output_size_in_bytes < 1.1 * 3 * model / 8
  # Largest while it works: an eighth of the embedding table, a few times over (random bits, uniform, normal).
  assert memory.temp_size_in_bytes < 0.3 * model


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
@pytest.mark.parametrize('mesh', ['4x2'], indirect=True)
def test_the_abstract_state_is_that_of_the_state_that_is_made(style, mesh):
  described = abstract_model(style, ComputeConfig(), 16)
  initialize = initializer(described, make_optimizer(OptimizerConfig()), 3, mesh, seed=0)
  state, made = abstract(initialize, mesh), initialize()
  assert jax.tree.structure(state) == jax.tree.structure(made)
  for expected, value in zip(jax.tree.leaves(state), jax.tree.leaves(made), strict=True):
    assert (expected.shape, expected.dtype) == (value.shape, value.dtype)
    assert value.sharding.is_equivalent_to(expected.sharding, value.ndim)
  stored = described.shardings(3, mesh)
  assert all(made.parameters[name].sharding.is_equivalent_to(stored[name], len(stored[name].spec)) for name in stored)
