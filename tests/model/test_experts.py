"""Mixture-of-experts layers: every token reaches its experts, whatever the devices, and balance is measured row by row."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiers import full

from gptjax.config import ComputeConfig, Config, MeshConfig, ModelConfig, RouterConfig, UserError
from gptjax.model import abstract_model, active_parameters, dispatch, flops_per_token, grouped, load_metrics, parameter_count
from gptjax.model.experts import _sums
from gptjax.sharding import batch_psum, batch_shard_map, check_sizes, make_mesh

MODEL = ModelConfig(layers=2, width=16, heads=2, mlp_width=12, mlp='swiglu', bias=False, vocab_size=40, experts=8, experts_per_token=3,
                    router=RouterConfig(balance_loss=0.01, z_loss=0.001))
EXPERTS, KINDS = 5, ('gelu', 'swiglu', 'geglu')


def naive(kind, x, rows, matrices):
  """Each row by itself, with the matrices of its expert."""
  *into, down = matrices
  expert = jnp.repeat(jnp.arange(EXPERTS), rows.sizes, total_repeat_length=rows.token.size)
  parts = [jnp.einsum('nd,ndf->nf', x[rows.token], w[expert]) for w in into]
  out = jnp.einsum('nf,nfd->nd', grouped.activate(kind, *parts), down[expert]) * rows.gain[:, None]
  return jnp.where(jnp.arange(rows.token.size)[:, None] < rows.sizes.sum(), out, 0)


@pytest.mark.parametrize('sizes', [(4, 0, 9, 1, 3), full((0, 0, 0, 0, 17)), full((5, 5, 5, 5, 5)), full((0, 0, 0, 0, 0))])
@pytest.mark.parametrize('backend, kind', [('blocks', 'swiglu'), ('ragged', 'swiglu'), full('blocks', 'gelu'), full('ragged', 'geglu')])
def test_grouped_products_are_those_of_each_row(backend, kind, sizes, monkeypatch):
  monkeypatch.setattr(grouped, 'BLOCKS', (6, 4))  # several blocks of an expert of both sizes, and parts of one
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
    return out[:total], jnp.zeros(x.shape).at[rows.token].add(dx[:total]), dgain[:total], sums

  @jax.jit
  def theirs(x, rows, matrices, dy):
    run = lambda x, gain, matrices: naive(kind, x, rows._replace(gain=gain), matrices)
    out, pullback = jax.vjp(run, x, rows.gain, matrices)
    return out, *pullback(jnp.where(jnp.arange(total)[:, None] < sum(sizes), dy[rows.token], 0))

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
  """A function (x [N, D], ids, gains [N, K]) -> sums over experts of gain * (expert + 1) * x, and expert + 1, on `groups` devices."""
  def local(x, ids, gains):
    way = dispatch.route(ids, gains, EXPERTS + 3, groups, exchange)
    first = jax.lax.axis_index('expert') * way.rows.sizes.size
    factor = first + 1 + jnp.repeat(jnp.arange(way.rows.sizes.size), way.rows.sizes, total_repeat_length=way.rows.token.size)
    rows = way.send(x)[way.rows.token]
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


@functools.cache
def layer_on(mesh, config):
  """A function of nothing: result, sums and gradients by input and parameters of one layer of random weights, on a mesh."""
  compute, rng = ComputeConfig(), np.random.default_rng(0)
  with jax.set_mesh(devices := make_mesh(mesh)):
    model = abstract_model(config, compute, 8)
    names = [name for name in model.shapes if name.startswith('blocks/1/mlp/')]
    zero = model.zero(0, devices)
    values = {name: jax.device_put(rng.normal(size=model.shapes[name].shape).astype(np.float32) / 3, model.shardings(0, devices)[name])
              for name in names}
    x = rng.normal(size=(8, 8, config.width)).astype(np.float32)
    mask = (rng.random((8, 8)) < 0.6).astype(np.float32)

    def local(values, x, mask):
      def loss(values, x):
        module = model.merge(values | {name: jnp.zeros(shape.shape) for name, shape in model.shapes.items() if name not in values})
        y, sums = module.blocks[1].mlp(x.reshape(-1, config.width), 1, mask, None)
        return (y * jnp.cos(jnp.arange(config.width))).sum() + sums['loss'], (y.reshape(x.shape), sums)
      (_, (y, sums)), (gradients, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(values, x)
      return y, batch_psum(sums), zero.reduce(gradients), dx

    kept = {name: zero.in_specs[name] for name in names}
    rows = PartitionSpec(('replica', 'data', 'expert'))
    run = batch_shard_map(local, (kept, rows, rows), (rows, PartitionSpec(), kept, rows))
    return jax.device_get(jax.jit(run)(values, x, mask))


EVERYTHING = dataclasses.replace(MODEL, shared_experts=1, expert_every=2, router=RouterConfig('sigmoid', True, True, 0.01, 0.001))


@pytest.mark.parametrize('mesh, config', [
  (MeshConfig(1, 2, expert=4), EVERYTHING), full(MeshConfig(2, 2, expert=2), MODEL), full(MeshConfig(1, 1, expert=8), EVERYTHING)])
def test_a_layer_is_the_same_on_every_mesh(mesh, config):
  one, many = layer_on(MeshConfig(1, 1), config), layer_on(mesh, config)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, 1e-4, 1e-5), one, many)


def test_balance_is_measured_row_by_row_over_the_tokens_that_count():
  _, sums, gradients, _ = layer_on(MeshConfig(1, 1), EVERYTHING)
  load = sums['load']
  assert load.shape == (2, 8) and not load[0].any()  # layer 0 has no experts
  count = load[1].sum() / 3
  assert 0 < count < 64 and count == int(count)  # of the 64 tokens
  np.testing.assert_allclose(gradients['blocks/1/mlp/balance'], load[1] - load[1].mean())  # what the bias moves against
  metrics = load_metrics(jnp.asarray(load))
  assert metrics['load_imbalance'] == pytest.approx(load[1].max() / load[1].mean())


@pytest.mark.parametrize('tokens', [1, 7])
def test_the_balance_loss_is_its_weight_per_token_if_all_experts_are_equally_likely_and_chosen(tokens):
  config = dataclasses.replace(MODEL, router=RouterConfig(balance_loss=0.5))
  logits, everyone = jnp.zeros((2 * tokens, 8)), jnp.full((2 * tokens, 8), 3 / 8)
  sums, _ = _sums(config, logits, jax.nn.softmax(logits), everyone, 0, jnp.ones((2, tokens)))
  assert sums['loss'] == pytest.approx(0.5 * 2 * tokens) and sums['router_entropy'] == pytest.approx(np.log(8) * tokens)  # of 2 layers


def test_counters_know_total_and_active_parameters():
  dense = dataclasses.replace(MODEL, experts=0, router=RouterConfig(), mlp_width=3 * 12)  # of the same active size
  router, expert = 2 * 16 * 8, 2 * 3 * 16 * 12
  assert parameter_count(MODEL, 8) == parameter_count(dense, 8) + router + 5 * expert
  assert active_parameters(MODEL, 8) == parameter_count(dense, 8) + router
  assert flops_per_token(MODEL, 8) == flops_per_token(dense, 8) + 6 * router


@pytest.mark.parametrize('values, message', [
  ({'experts_per_token': 9}, 'model.experts_per_token: 9, expected: 1 to model.experts=8'),
  ({'expert_every': 3}, 'model.expert_every: 3, expected: 1 to model.layers=2'),
  ({'experts': 0}, 'model.router: .* expected: its default unless model.experts is above 0'),
])
def test_experts_that_cannot_be_are_an_error_line(values, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(MODEL, **values)


def test_a_mesh_that_does_not_divide_the_experts_is_an_error_line():
  with pytest.raises(UserError, match='mesh.expert: 4, expected: a divisor of model.experts=6: 1, 2, 3, 6'):
    check_sizes(Config(model=dataclasses.replace(MODEL, experts=6)), make_mesh(MeshConfig(1, 1, expert=4)))
  with pytest.raises(UserError, match='compute.scan: True, expected: false with model.expert_every above 1'):
    Config(model=dataclasses.replace(MODEL, expert_every=2), compute=ComputeConfig(scan=True))
