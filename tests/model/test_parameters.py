"""The abstract model describes every parameter, and merges what is initialized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full
from flax import nnx

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import abstract_model, stack_layers


@pytest.mark.parametrize('scan', [False, True])
@pytest.mark.usefixtures('one_device')
def test_a_module_has_the_values_that_are_merged_under_their_names(style, scan, random_parameters):
  described = abstract_model(style, ComputeConfig(scan=scan), 16)
  parameters = random_parameters(described)
  state = nnx.to_flat_state(nnx.split(described.merge(parameters))[1])
  merged = {'/'.join(map(str, path)): variable[...] for path, variable in state}
  assert merged.keys() == parameters.keys()
  assert all((merged[name] == parameters[name]).all() for name in parameters)


@pytest.mark.parametrize('scan', [False, True])
def test_an_abstract_model_knows_the_axes_of_every_parameter_without_a_mesh(style, scan):
  described = abstract_model(style, ComputeConfig(scan=scan), 16)
  assert {shape.dtype for shape in described.shapes.values()} == {jnp.dtype('float32')}
  sizes = {'layers': 2, 'embed': 32, 'positions': 16, 'head_width': 8, ('vocab', 64): 64, ('mlp', style.hidden_width): style.hidden_width,
           ('heads', 4): 32, ('kv_heads', style.key_heads): 8 * style.key_heads}
  for name, axes in described.axes.items():
    expected = tuple(sizes[axis] for axis in axes)
    assert (('kv_heads', style.key_heads) in axes) == ('/k/' in name or '/v/' in name)
    assert described.shapes[name].shape == expected, name
    assert ('layers' in axes) == (scan and name.startswith('blocks/'))


def test_a_style_has_the_parameters_of_its_parts_and_no_others(style):
  names = {name.split('/', 2)[-1] if name.startswith('blocks/') else name for name in abstract_model(style, ComputeConfig(), 16).shapes}
  matrices = {f'attention/{part}' for part in ('q', 'k', 'v', 'out')} | {'mlp/up', 'mlp/down'}
  norms = {'norm', 'attention_norm', 'mlp_norm'}
  if style.positions == 'learned':
    expected = {f'{part}/{kind}' for part in matrices for kind in ('kernel', 'bias')}
    expected |= {'tokens/table', 'positions/table'}
    expected |= {f'{part}/{kind}' for part in norms for kind in ('gain', 'bias')}
  else:
    expected = {f'{part}/kernel' for part in matrices | {'mlp/gate', 'lm_head'}} | {'tokens/table'}
    expected |= {f'{part}/gain' for part in norms | {'attention/q_norm', 'attention/k_norm'}}
  assert names == expected


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
def test_the_same_seed_gives_the_same_parameters_and_another_gives_others(style, one_device):
  described = abstract_model(dataclasses.replace(style, layers=1), ComputeConfig(), 4)
  draw = jax.jit(lambda seed: described.initialize(jax.random.key(seed), described.shardings(0, one_device)))
  one, again, other = draw(0), draw(0), draw(1)
  for name in one:
    np.testing.assert_array_equal(one[name], again[name])
    assert (one[name] != other[name]).any() == name.endswith(('kernel', 'table'))


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
def test_initial_values_depend_on_names_and_not_on_what_else_the_model_has(style, one_device):
  def draw(model, **compute):
    described = abstract_model(model, ComputeConfig(**compute), 4)
    return jax.jit(lambda: described.initialize(jax.random.key(0), described.shardings(0, one_device)))()
  one = draw(style)
  scanned, untied = draw(style, scan=True), draw(dataclasses.replace(style, tied=False, layers=3))
  for name, value in stack_layers(one).items():
    np.testing.assert_array_equal(value, scanned[name], err_msg=name)
  for name in one:
    if '/down/' not in name and '/out/' not in name:  # their spread depends on the number of layers
      np.testing.assert_array_equal(one[name], untied[name], err_msg=name)


@pytest.mark.parametrize('norm, gain', [('layernorm', 1 / 4), full('rmsnorm', 1 / 4), full('rmsnorm1p', 1 / 4 - 1)])
def test_by_mup_initial_values_depend_on_the_width(norm, gain, one_device):
  def draw(**values):
    model = ModelConfig(layers=2, width=64, heads=4, vocab_size=64, tied=False, experts=4, expert_every=2, norm=norm, **values)
    described = abstract_model(model, ComputeConfig(), 16)
    return jax.jit(lambda: described.initialize(jax.random.key(0), described.shardings(0, one_device)))()

  standard, base, wide = draw(), draw(mup_base=64), draw(mup_base=16)
  for name, value in standard.items():
    np.testing.assert_array_equal(base[name], value, err_msg=name)
    if name == 'norm/gain':
      np.testing.assert_array_equal(wide[name], np.full(64, gain, np.float32))
    else:  # arXiv:2203.03466, table 8: the variance of hidden matrices falls as the width, that of outputs, as the router's, as its square
      shrinks = 1 if not name.startswith('blocks/') or not name.endswith('kernel') else 4 if 'router' in name else 2
      np.testing.assert_allclose(wide[name] * shrinks, value, 1e-5, err_msg=name)
