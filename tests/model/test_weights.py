"""How weights are read and where their gradients go: the dtype of sums, what a stage gathers, and what crosses which network."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full
from flax import nnx
from tiny import batch

from gptjax.config import AXIS_NAMES, ComputeConfig, MeshConfig
from gptjax.model import abstract_model
from gptjax.model.weights import lookup, product
from gptjax.planning.collectives import collectives
from gptjax.sharding import BATCH_SPEC, batch_shard_map, make_mesh, spec, batch_psum
from gptjax.training import next_token
from gptjax.training.step import summed_gradients


def kernel(weight, axes=('embed', ('mlp', 32)), dtype='bfloat16'):
  return nnx.Param(weight, axes=axes, dtype=dtype, size=weight.shape[0])


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def place(mesh, array, *names):
  return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*names)))


@pytest.mark.parametrize('mesh', ['1x1', '4x2'], indirect=True)
@pytest.mark.parametrize('transposed', [False, True])
def test_gradients_of_bfloat16_products_are_summed_in_float32(transposed, mesh):
  # bfloat16 holds 3 digits: a sum rounded to it anywhere would be off by more than 1e-3.
  axes = (('mlp', 32), 'embed') if transposed else ('embed', ('mlp', 32))
  x = place(mesh, draw(512, 16), *BATCH_SPEC).astype(jnp.bfloat16)
  dy = place(mesh, draw(512, 32, seed=1), *BATCH_SPEC, *spec(('mlp', 32))).astype(jnp.bfloat16)
  w = place(mesh, draw(32, 16) if transposed else draw(16, 32), *spec(*axes))

  def local(x, w, dy):
    return batch_psum(jax.vjp(lambda w: product(x, kernel(w, axes), None, transposed), w)[1](dy)[0])
  gradient = jax.jit(batch_shard_map(local, (BATCH_SPEC, jax.P(), BATCH_SPEC), jax.P()))(x, w, dy)
  exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
  assert gradient.dtype == jnp.float32
  np.testing.assert_allclose(gradient, exact.T if transposed else exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('mesh', ['1x1', '4x2'], indirect=True)
@pytest.mark.parametrize('rows', [None, 'model'])
def test_rows_of_a_table_are_looked_up_and_their_gradients_summed_in_float32(rows, mesh):
  axes, table = (('vocab', 8), 'embed'), draw(8, 16)
  ids = np.random.default_rng(2).integers(0, 8, 512, np.int32)
  dy = place(mesh, draw(512, 16), *BATCH_SPEC).astype(jnp.bfloat16)

  def local(w, ids, dy):
    found, backward = jax.vjp(lambda w: jax.reshard(lookup(kernel(w, axes), ids, rows), jax.P(None, None)), w)
    return found, batch_psum(backward(dy)[0])
  run = jax.jit(batch_shard_map(local, (jax.P(), BATCH_SPEC, BATCH_SPEC), (BATCH_SPEC, jax.P())))
  found, gradient = run(place(mesh, table, *spec(*axes)), place(mesh, ids, *BATCH_SPEC), dy)
  np.testing.assert_array_equal(found, jnp.asarray(table, jnp.bfloat16)[ids])
  exact = np.zeros((8, 16))
  np.add.at(exact, ids, np.asarray(dy, np.float64))
  np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-4)


def lowered(style, sizes, stage, microbatches, **compute):
  """The program of a gradient before the compiler has seen it, and the bytes of all parameters."""
  with jax.set_mesh(mesh := make_mesh(MeshConfig(*sizes))):
    described = abstract_model(style, ComputeConfig(**compute), 16)
    shardings, rows = described.shardings(stage, mesh), batch(8 * microbatches)
    parameters = {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[name]) for name, s in described.shapes.items()}
    placed = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, BATCH_SPEC)) for name, x in rows.items()}
    run = jax.jit(summed_gradients(described, next_token(), stage, mesh, microbatches))
    return run.lower(parameters, {}, placed, jax.random.key(0)), sum(4 * s.size for s in described.shapes.values())


def exchanges(style, sizes, stage, microbatches, **compute):
  """Collectives of a compiled gradient, without those of small arrays, and the bytes of all parameters."""
  program, parameters = lowered(style, sizes, stage, microbatches, **compute)
  mesh = dict(zip(AXIS_NAMES, (*sizes[2:], 1)[:1] + sizes[:2]))
  return [one for one in collectives(program.compile().as_text(), mesh) if one.payload > 4], parameters


@pytest.mark.parametrize('style', ['modern'], indirect=True)
@pytest.mark.parametrize('stage', [0, 1])
def test_stages_0_and_1_reduce_gradients_once_per_step_however_many_microbatches(style, stage):
  kind = 'reduce-scatter' if stage else 'all-reduce'
  for microbatches in (1, 4):
    found, parameters = exchanges(style, (8, 1), stage, microbatches, scan=True)
    assert 1.0 <= sum(one.payload * one.trips for one in found) / parameters <= 1.02, (microbatches, found)
    assert {one.kind for one in found} <= {kind, 'all-reduce'} and all(one.trips == 1 for one in found)


@pytest.mark.parametrize('style', [full('modern'), 'gpt2'], indirect=True)  # the table of the second is read twice
def test_stages_2_and_3_scatter_with_every_microbatch_and_stage_3_gathers_twice(style):
  for stage in (2, 3):
    found, parameters = exchanges(style, (8, 1), stage, 2, scan=True)
    sent = lambda kind: sum(one.payload * one.trips for one in found if one.kind == kind) / parameters
    assert 1.9 < sent('reduce-scatter') <= 2.02, found  # small parameters are all-reduced once
    assert sent('all-reduce') < 0.05
    # Blocks forward and backward, embedding and head once, of two microbatches.
    assert sent('all-gather') == 0 if stage == 2 else 2 < sent('all-gather') < 4


@pytest.mark.parametrize('style', ['modern'], indirect=True)
def test_what_crosses_replicas_is_the_shard_that_a_device_keeps(style):
  found, parameters = exchanges(style, (4, 1, 2), 3, 1)
  crossing = sum(one.payload for one in found if one.axes == ('replica',))
  assert crossing / parameters == pytest.approx(1 / 4, abs=0.02)


@pytest.mark.parametrize('style', [full('modern'), 'gpt2'], indirect=True)
def test_stage_3_gathers_a_scanned_matrix_for_each_pass_and_keeps_none(style):
  found, _ = exchanges(dataclasses.replace(style, layers=2, mlp_width=80), (8, 1), 3, 1, scan=True)
  matrix = [one for one in found if one.kind == 'all-gather' and one.payload == 4 * 32 * 80]
  # Forward and backward of each of two layers; the feed-forward layer has two matrices of this size, or three if gated.
  assert sum(one.trips for one in matrix) == 2 * 2 * (3 if style.mlp == 'swiglu' else 2), matrix


@pytest.mark.parametrize('style', ['gpt2'], indirect=True)
@pytest.mark.parametrize('remat', ['none', full('full')])
def test_stage_3_gathers_matrices_of_single_layers_behind_a_barrier_again(style, remat):
  # Of the program before compilation: XLA for CPUs drops barriers, and then keeps what it should gather again behind a barrier.
  program, _ = lowered(dataclasses.replace(style, layers=2, mlp_width=80), (8, 1), 3, 1, remat=remat)
  gathered = re.findall(r'all_gather.*-> tensor<32x80xf32>', program.as_text())
  assert len(gathered) >= 2 * 2 and 'optimization_barrier' in program.as_text()
