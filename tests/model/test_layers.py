"""The small modules against their formulas in numpy, and dropout: its rate, its keys, its masks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full

from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import abstract_model
from gptjax.model.layers import Embedding, Linear, Norm, dropout

SMALL = ModelConfig(width=16, heads=2)


def fill(module, **values):
  """Gives a module's parameters values, as float32."""
  for name, value in values.items():
    setattr(module, name, getattr(module, name).replace(jnp.asarray(value, jnp.float32)))
  return module


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('kind', ['layernorm', 'rmsnorm'])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('scale', [5, 3e-3])  # of the smaller, 1e-5 is half the mean square
def test_norm_equals_its_formula(kind, bias, scale):
  rng = np.random.default_rng(0)
  x = scale * (rng.standard_normal((3, 4, 16)) + 0.4)
  gain, offset = rng.standard_normal((2, 16))
  norm = Norm(16, 'embed', dataclasses.replace(SMALL, norm=kind, bias=bias), ComputeConfig())
  assert (norm.bias is not None) == (bias and kind == 'layernorm')  # rmsnorm has none (arXiv:1910.07467)
  fill(norm, gain=gain, **({} if norm.bias is None else {'bias': offset}))
  centered = x - x.mean(-1, keepdims=True) if kind == 'layernorm' else x
  expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * gain
  expected += 0 if norm.bias is None else offset
  np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, 1e-4, 1e-5)


@pytest.mark.usefixtures('one_device')
def test_norms_compute_in_float32_whatever_the_precision():
  # Beside 3000, bfloat16 holds no 0.5: a mean taken in it would lose the differences between features.
  x = (3000 + 8 * np.random.default_rng(1).standard_normal((4, 16))).astype(np.float32)
  half = jnp.asarray(x, jnp.bfloat16)
  norm = fill(Norm(16, 'embed', SMALL, ComputeConfig(dtype='bfloat16')), gain=np.ones(16), bias=np.zeros(16))
  rounded = np.asarray(half, np.float64)
  expected = (rounded - rounded.mean(-1, keepdims=True)) / np.sqrt(rounded.var(-1, keepdims=True) + 1e-5)
  assert norm(half).dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(norm(half), np.float64), expected, 1e-2, 1e-2)


@pytest.mark.usefixtures('one_device')
def test_linear_and_embedding_equal_their_formulas():
  rng = np.random.default_rng(2)
  x, ids = rng.standard_normal((5, 16), np.float32), rng.integers(0, 20, 5)
  kernel, table = rng.standard_normal((16, 24), np.float32), rng.standard_normal((20, 16), np.float32)
  linear = fill(Linear((16, 24), ('embed', 'mlp'), 0.5, ComputeConfig(), bias=True), kernel=kernel, bias=np.arange(24))
  np.testing.assert_allclose(linear(jnp.asarray(x)), x @ kernel + np.arange(24), 1e-5, 1e-5)
  embedding = fill(Embedding(20, 16, 'vocab', ComputeConfig()), table=table)
  np.testing.assert_array_equal(jax.jit(embedding)(jnp.asarray(ids)), table[ids])


@pytest.mark.parametrize('style', [full('modern'), 'gpt2'], indirect=True)
def test_fresh_parameters_have_gpt2s_spread(style, one_device):
  # Radford et al. 2019, section 2.3: 0.02, and on the residual stream 0.02 / sqrt(additions to it, two a layer).
  described = abstract_model(dataclasses.replace(style, width=64, layers=8), ComputeConfig(scan=True), 64)
  fresh = jax.jit(lambda key: described.initialize(key, described.shardings(0, one_device)))(jax.random.key(0))
  for name, value in fresh.items():
    if name.endswith(('kernel', 'table')):
      expected = 0.02 / 4 if '/out/' in name or '/down/' in name else 0.02
      np.testing.assert_allclose(np.std(value), expected, 0.05, err_msg=name)
      layers = np.asarray(value).reshape(8, -1) if name.startswith('blocks/') else np.asarray(value)[None]
      assert len({layer.tobytes() for layer in layers}) == len(layers), f'{name}: layers start equal'
    else:
      assert (value == (1 if name.endswith('gain') else 0)).all(), name


@pytest.mark.parametrize('mesh', ['8x1'], indirect=True)
@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_dropout_keeps_its_share_and_the_mean(mesh, rate):
  x, keys = jnp.ones((64, 256)), jax.random.split(jax.random.key(0), 16)  # 4 tokens per row
  dropped = np.asarray(jax.jit(lambda keys: dropout(x, rate, keys))(keys))
  assert set(np.unique(dropped)) == {np.float32(0), np.float32(1) / np.float32(1 - rate)}
  assert abs((dropped == 0).mean() - rate) < 0.02
  assert len({row.tobytes() for row in dropped}) == 64  # no two tokens, and so no two devices, share a mask


@pytest.mark.usefixtures('one_device')
def test_no_key_or_no_rate_drops_nothing():
  x = jnp.ones((4, 4))
  assert dropout(x, 0.5, None) is x
  assert dropout(x, 0.0, jax.random.split(jax.random.key(0), 4)) is x


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('scan', [full(False), True])  # with equal masks: test_transformer.py
def test_every_position_of_every_layer_has_its_own_mask(scan):
  # All parameters are zero but one that adds 1 everywhere: a feature is zero at the end just where it was dropped.
  config = ModelConfig(layers=3, width=32, heads=4, vocab_size=8, norm='rmsnorm', dropout=0.5)
  described = abstract_model(config, ComputeConfig(scan=scan), 64)
  zeros = {name: np.full(s.shape, name == 'norm/gain', np.float32) for name, s in described.shapes.items()}
  places = [('tokens/table', None)]
  for part in ('attention/out/bias', 'mlp/down/bias'):
    places += [(f'blocks/{part}', i) if scan else (f'blocks/{i}/{part}', None) for i in range(3)]

  @jax.jit
  def kept(parameters, keys):
    return described.merge(parameters).hidden(jnp.zeros((2, 64), jnp.int32), keys=keys)[0] != 0

  def masks(keys):
    for name, layer in places:
      value = np.zeros_like(zeros[name])
      value[... if layer is None else layer] = 1
      yield np.asarray(kept(jax.tree.map(jnp.asarray, zeros | {name: value}), keys))

  first, again, other = (list(masks(jax.random.split(jax.random.key(seed), 2))) for seed in (0, 0, 1))
  assert len({mask.tobytes() for mask in first + other}) == 2 * len(places)
  for mask, repeated in zip(first, again, strict=True):
    assert abs(mask.mean() - 0.5) < 0.05
    np.testing.assert_array_equal(mask, repeated)
  assert all(mask.all() for mask in masks(None))
