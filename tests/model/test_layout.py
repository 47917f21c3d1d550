"""Stacked and unstacked layers are the same values under other names, whatever kind of array holds them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import abstract_model, stack_layers, stacked_name, unstack_layers

CONFIG = ModelConfig(layers=11, width=16, heads=2, vocab_size=32)  # 11: layer 10 comes after 9, not after 1


@pytest.mark.parametrize('array', [np.asarray, jnp.asarray])
def test_layers_are_stacked_in_order_and_unstacked_again(array):
  layers = {f'blocks/{layer}/norm/gain': array(np.full(3, layer, np.float32)) for layer in reversed(range(11))}
  parameters = layers | {'norm/gain': array(np.ones(3, np.float32))}
  stacked = stack_layers(parameters)
  assert set(stacked) == {'blocks/norm/gain', 'norm/gain'}
  assert np.array_equal(stacked['blocks/norm/gain'], np.arange(11.0)[:, None] * np.ones(3))
  back = unstack_layers(stacked)
  assert set(back) == set(parameters) and all(np.array_equal(back[name], parameters[name]) for name in parameters)
  assert all(type(value) is type(parameters['norm/gain']) for value in [*stacked.values(), *back.values()])
  assert set(stack_layers(stacked)) == set(stacked) and set(unstack_layers(parameters)) == set(parameters)


def test_shapes_of_both_layouts_are_those_of_the_two_models():
  unstacked, stacked = (abstract_model(CONFIG, ComputeConfig(scan=scan), 8).shapes for scan in (False, True))
  assert stack_layers(unstacked) == stacked and unstack_layers(stacked) == unstacked


def test_layouts_can_be_changed_inside_jit():
  unstacked = abstract_model(CONFIG, ComputeConfig(), 8).shapes
  assert jax.eval_shape(lambda parameters: unstack_layers(stack_layers(parameters)), unstacked) == unstacked


def test_names():
  assert stacked_name('blocks/10/mlp/up/kernel') == ('blocks/mlp/up/kernel', 10)
  assert stacked_name('blocks/mlp/up/kernel') == ('blocks/mlp/up/kernel', None)
  assert stacked_name('lm_head/kernel') == ('lm_head/kernel', None)
