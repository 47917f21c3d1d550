"""Mixture-of-experts layers: every token reaches its experts, whatever the devices, and balance is measured row by row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiers import full

from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, RouterConfig, UserError
from gptjax.model import abstract_model, active_parameters, dispatch, flops_per_token, grouped, load_metrics, parameter_count
from gptjax.model.experts import Experts
from gptjax.sharding import batch_shard_map, check_sizes, make_mesh, spec

MODEL = ModelConfig(layers=2, width=16, heads=2, mlp_width=12, mlp='swiglu', bias=False, vocab_size=40, experts=8, experts_per_token=3,
                    router=RouterConfig(balance_loss=0.01, z_loss=0.001))
EXPERTS, KINDS = 5, ('gelu', 'swiglu', 'geglu')


def naive(kind, x, rows, matrices):
  """Each row by itself, with the matrices of its expert."""
  *into, down = matrices
  expert = jnp.repeat(jnp.arange(EXPERTS), rows.sizes, total_repeat_length=rows.index.size)
  parts = [jnp.einsum('nd,ndf->nf', x[rows.index], w[expert]) for w in into]
  out = jnp.einsum('nf,nfd->nd', grouped.activate(kind, *parts), down[expert]) * rows.gain[:, None]
  return jnp.where(jnp.arange(rows.index.size)[:, None] < rows.sizes.sum(), out, 0)


@pytest.mark.parametrize('sizes', [(4, 0, 9, 1, 3), full((0, 0, 0, 0, 17)), full((5, 5, 5, 5, 5)), full((0, 0, 0, 0, 0))])
@pytest.mark.parametrize('backend, kind', [('blocks', 'swiglu'), ('ragged', 'swiglu'), full('blocks', 'gelu'), full('ragged', 'geglu')])
def test_grouped_products_are_those_of_each_row(backend, kind, sizes, monkeypatch):
  monkeypatch.setattr(grouped, 'BLOCK', 4)  # several blocks of an expert, and parts of one
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  total, x, dy = 25, draw(7, 6), draw(7, 6)
  gain = jnp.where(jnp.arange(total) < sum(sizes), draw(total), 0)
  rows = grouped.Sorted(jnp.asarray(rng.integers(0, 7, total)), gain, jnp.array(sizes))
  matrices = tuple(draw(EXPERTS, *shape) for shape in [(6, 8)] * (1 if kind == 'gelu' else 2) + [(8, 6)])

  @jax.jit
  def ours(x, rows, matrices, dy):
    out, parts = grouped.forward(backend, kind, x, rows, matrices)
    dx, dgain, sums = grouped.backward(backend, kind, x, rows, matrices, parts, dy)
    return out[:total], jnp.zeros(x.shape).at[rows.index].add(dx[:total]), dgain[:total], sums

  @jax.jit
  def theirs(x, rows, matrices, dy):
    run = lambda x, gain, matrices: naive(kind, x, rows._replace(gain=gain), matrices)
    out, pullback = jax.vjp(run, x, rows.gain, matrices)
    return out, *pullback(jnp.where(jnp.arange(total)[:, None] < sum(sizes), dy[rows.index], 0))

  for found, wanted in zip(jax.tree.leaves(ours(x, rows, matrices, dy)), jax.tree.leaves(theirs(x, rows, matrices, dy)), strict=True):
    np.testing.assert_allclose(found, wanted, 1e-4, 1e-5)


def test_the_kernel_of_a_tpu_computes_the_products_of_each_experts_rows():
  rng, sizes = np.random.default_rng(0), jnp.array([300, 0, 100, 612, 500])  # some rows belong to no expert
  a, b = (jnp.asarray(rng.normal(size=(2048, width)), jnp.float32) for width in (64, 40))
  np.testing.assert_allclose(grouped._tiled_outer(sizes, a, b, interpret=True), grouped._outer(sizes, a, b), 1e-4, 1e-3)


def all_to_all(operand, output, leave, send, arrive, receive, *, axis_name):
  """What jax.lax.ragged_all_to_all does, which CPUs lack, by gathering everything."""
  everything = jax.lax.all_gather((operand, leave, send, arrive), axis_name)
  me = jax.lax.axis_index(axis_name)
  for sender in range(receive.size):
    rows, begin, count, at = (x[sender] for x in everything)
    place = jnp.arange(rows.shape[0]) - begin[me]
    mine = (place >= 0) & (place < count[me])
    output = output.at[jnp.where(mine, at[me] + place, output.shape[0])].set(rows, mode='drop')
  return output


@functools.cache
def routed(groups, exchange):
  """A function (x [N, D], ids, gains [N, K]) -> sums over experts of gain * (expert + 1) * x, and of the gains' factor, on so many devices."""
  def local(x, ids, gains):
    way = dispatch.route(ids, gains, EXPERTS + 3, groups, exchange)
    first = jax.lax.axis_index('expert') * way.rows.sizes.size
    factor = first + 1 + jnp.repeat(jnp.arange(way.rows.sizes.size), way.rows.sizes, total_repeat_length=way.rows.index.size)
    rows = way.send(x)[way.rows.index]
    used = jnp.arange(rows.shape[0]) < way.rows.sizes.sum()
    numbers = jnp.where(used, factor, 0)
    return way.collect(rows * (way.rows.gain * numbers)[:, None]), way.collect_gains(numbers * 1.0)

  mesh, rows = make_mesh(MeshConfig(1, 1, expert=groups)), PartitionSpec('expert')
  run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows,) * 3, out_specs=(rows,) * 2, check_vma=False))
  return lambda *arrays: run(*jax.device_put(arrays, NamedSharding(mesh, rows)))


@pytest.mark.parametrize('groups, exchange', [(4, all_to_all), (4, None), full(2, all_to_all), full(8, all_to_all), full(8, None)])
@pytest.mark.parametrize('skewed', [False, True])
def test_every_token_reaches_its_experts_and_comes_back(groups, exchange, skewed):
  rng = np.random.default_rng(groups)
  ids = np.argsort(rng.random((16, 8)) * (np.arange(8) ** 2 if skewed else 1), 1)[:, :3]  # skewed: most go to the first device
  x, gains = rng.normal(size=(16, 4)).astype(np.float32), rng.random((16, 3), np.float32)
  y, factors = routed(groups, exchange)(x, ids, gains)
  np.testing.assert_array_equal(factors, ids + 1)
  np.testing.assert_allclose(y, x * (gains * (ids + 1)).sum(1, keepdims=True), 1e-5)
