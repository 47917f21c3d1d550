"""Attention over rows whose tokens are divided over devices: the same outputs and gradients, equal work, no square of the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full

from gptjax.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, UserError
from gptjax.model import context_attention
from gptjax.model.attention import attention
from gptjax.model.kernels import ScoreConfig
from gptjax.sharding import batch_shard_map, check_sizes, make_mesh, put_rows, token_order, token_places

HEADS, KEY_HEADS, LENGTH, WIDTH = 4, 2, 48, 8


@pytest.mark.parametrize('size', [1, 2, 4])
def test_each_device_has_an_early_and_a_late_part_and_knows_their_places(size):
  with jax.set_mesh(mesh := make_mesh(MeshConfig(1, 1, context=size))):
    placed = put_rows(mesh, {'tokens': np.arange(3 * LENGTH).reshape(3, LENGTH)}, 3)['tokens']
    places = jax.jit(batch_shard_map(lambda: token_places(LENGTH // size), (), jax.P('context')))()
  placed, here = np.asarray(placed), np.asarray(places)
  np.testing.assert_array_equal(placed[1], LENGTH + here)
  np.testing.assert_array_equal(here, token_order(LENGTH, size))
  assert sorted(here) == list(range(LENGTH))
  by_device = here.reshape(size, 2, -1)
  assert (np.diff(by_device) == 1).all() and (by_device[:, 0, 0] + by_device[:, 1, -1] == LENGTH - 1).all()


def attended(sizes, exchange, score, rate, block):
  """Output, and gradients of queries, keys and values, of rows of three segments, on a mesh of such sizes."""
  draw = lambda seed, heads: np.random.default_rng(seed).standard_normal((2, heads, LENGTH, WIDTH), np.float32)
  arrays = [draw(seed, heads) for seed, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS, HEADS))]
  segments = np.sort(np.random.default_rng(3).integers(0, 3, (2, LENGTH)), 1).astype(np.int32)
  config, compute = ModelConfig(heads=HEADS, kv_heads=KEY_HEADS, dropout=rate), ComputeConfig(context_attention=exchange)

  def local(q, k, v, weights, segments, keys):
    def total(q, k, v):
      out = attention(config, compute, score, q, k, v, segments, keys)
      return jnp.sum(out * weights), out
    gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return out, gradients

  mesh = make_mesh(MeshConfig(**{'data': 1, 'model': 1} | sizes))
  order = token_order(LENGTH, mesh.shape['context'])
  with jax.set_mesh(mesh), pytest.MonkeyPatch.context() as patch:
    patch.setattr(context_attention, 'MAX_BLOCK', block)
    tokens, heads = jax.P(None, 'context'), jax.P(None, None, 'context')
    put = lambda x, *split: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*split)))
    inputs = [put(x[:, :, order], None, 'model' if mesh.shape['model'] > 1 else None, 'context') for x in arrays]
    run = jax.jit(batch_shard_map(local, (*[heads] * 4, tokens, jax.P()), heads))
    found = run(*inputs, put(segments[:, order], None, 'context'), jax.random.split(jax.random.key(0), 2))
  return [np.asarray(x)[:, :, np.argsort(order)] for x in jax.tree.leaves(found)]


@pytest.fixture(scope='module')
def plain():
  """What one device finds, by score and rate."""
  return {}


SCORE, ALL = ScoreConfig(0.4), ScoreConfig(0.4, cap=2.0, window=17)


@pytest.mark.parametrize('sizes, exchange, score, rate, block', [
  ({'context': 4}, 'ring', ALL, 0.0, 3), ({'context': 2, 'model': 2}, 'all_gather', ALL, 0.3, 6),
  *(full({'context': size, 'model': model}, exchange, score, rate, block) for exchange in context_attention.EXCHANGES
    for size, model, score, rate, block in ((2, 1, SCORE, 0.0, 12), (4, 2, SCORE, 0.3, 2), (4, 1, ALL, 0.3, 6), (8, 1, SCORE, 0.0, 1),
                                            (2, 2, ScoreConfig(0.4, window=1), 0.0, 4), (4, 1, ScoreConfig(0.4, window=LENGTH), 0.0, 6)))])
def test_attention_over_divided_tokens_is_that_of_one_device(sizes, exchange, score, rate, block, plain):
  if (score, rate) not in plain:
    plain[score, rate] = attended({}, exchange, score, rate, block)
  found = attended(sizes, exchange, score, rate, block)
  for name, array, expected in zip(('output', 'dq', 'dk', 'dv'), found, plain[score, rate], strict=True):
    np.testing.assert_allclose(array, expected, 1e-4, 1e-5, err_msg=name)


def test_every_device_computes_half_a_square_for_every_chunk(monkeypatch):
  monkeypatch.setattr(context_attention, 'MAX_BLOCK', 2)
  size, static = 4, lambda window: context_attention._Static(ScoreConfig(1.0, window=window), 'ring', 0.0)
  part = LENGTH // size // 2 // 2  # blocks in a part of the row

  def counted(window):
    def local():
      q, k = jnp.zeros((1, 1, 1, LENGTH // size, 1)), jnp.zeros((1, 1, LENGTH // size, 1))
      chunk, add = context_attention._Chunk(k, k, None), lambda pair, count: count + 1
      return jnp.stack([context_attention._over_pairs(static(window), q, None, None, chunk, jnp.int32(device), add, jnp.int32(0))
                        for device in range(size)])[None]
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, context=size))):
      return np.asarray(jax.jit(batch_shard_map(local, (), jax.P('context')))())

  expected = np.full((size, size), 2 * part * part)
  np.testing.assert_array_equal(counted(0), expected + np.eye(size, dtype=int) * part)  # on the diagonal blocks are half seen
  near = counted(1)
  np.testing.assert_array_equal(near, np.eye(size, dtype=int) * 2 * part)  # chunks out of the window cost nothing


@pytest.mark.parametrize('length, compute, message', [
  (250, {}, 'data.context: 250, expected: a multiple of 2 * mesh.context=4: 248 or 252'),
  (3, {}, 'data.context: 3, expected: a multiple of 2 * mesh.context=4: 4'),
  (256, {'attention': 'splash'},
   "compute.attention: 'splash', expected: auto or blocks with mesh.context=2: compute.context_attention says how tokens attend")])
def test_rows_and_attention_that_cannot_be_divided_are_refused(length, compute, message):
  mesh = make_mesh(MeshConfig(1, 1, context=2))
  with pytest.raises(UserError) as caught:
    check_sizes(Config(data=DataConfig(context=length), compute=ComputeConfig(**compute)), mesh)
  assert str(caught.value) == message
  check_sizes(Config(data=DataConfig(context=256)), mesh)
