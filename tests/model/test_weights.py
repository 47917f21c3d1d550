"""Where gradients of weights go, in which type they are summed on the way, and what crosses which network."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gptjax.config import MeshConfig
from gptjax.model import Copy, abstract_model
from gptjax.model.weights import lookup, product
from gptjax.sharding import make_mesh, place


def kernel(weight, axes=('embed', ('mlp', 32)), dtype='bfloat16'):
  return nnx.Param(weight, axes=axes, dtype=dtype)


def draw(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize('mesh', ['1x1', '4x2'], indirect=True)
@pytest.mark.parametrize('transposed', [False, True])
def test_gradients_of_bfloat16_products_are_summed_in_float32(transposed, mesh):
  # bfloat16 holds 3 digits: a sum rounded to it anywhere would be off by more than 1e-3.
  axes = (('mlp', 32), 'embed') if transposed else ('embed', ('mlp', 32))
  x = place(mesh, draw(512, 16), 'batch', None).astype(jnp.bfloat16)
  dy = place(mesh, draw(512, 32, seed=1), 'batch', ('mlp', 32)).astype(jnp.bfloat16)
  w = place(mesh, draw(32, 16) if transposed else draw(16, 32), *axes)
  run = lambda x, w, dy: jax.vjp(lambda w: product(x, kernel(w, axes), 'batch', transposed), w)[1](dy)[0]
  gradient = jax.jit(run)(x, w, dy)
  exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
  assert gradient.dtype == jnp.float32
  np.testing.assert_allclose(gradient, exact.T if transposed else exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('mesh', ['1x1', '4x2'], indirect=True)
def test_gradients_of_a_table_are_summed_in_float32(mesh):
  axes = (('vocab', 8), 'embed')
  ids = np.random.default_rng(2).integers(0, 8, 512, np.int32)
  dy = place(mesh, draw(512, 16), 'batch', None).astype(jnp.bfloat16)
  run = lambda w, ids, dy: jax.vjp(lambda w: lookup(kernel(w, axes), ids, 'batch'), w)[1](dy)[0]
  gradient = jax.jit(run)(place(mesh, draw(8, 16), *axes), place(mesh, ids, 'batch'), dy)
  exact = np.zeros((8, 16))
  np.add.at(exact, ids, np.asarray(dy, np.float64))
  np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('mesh', ['4x2'], indirect=True)
def test_the_gradient_of_a_copy_lies_where_its_zeros_do(mesh):
  x = place(mesh, draw(64, 16), 'batch', None)
  whole = place(mesh, draw(16, 32), 'embed', 'mlp')
  zeros = jax.device_put(jnp.zeros((16, 32)), jax.sharding.NamedSharding(mesh, jax.P('data', 'model')))
  total = lambda w: jnp.sum(jnp.square(product(x, kernel(w, dtype='float32'), 'batch')))
  plain = jax.jit(jax.grad(total))(whole)
  apart = jax.jit(jax.grad(lambda zeros: total(Copy(whole, zeros))))(zeros)
  assert apart.sharding.spec == jax.P('data', 'model') and plain.sharding.spec == jax.P(None, 'model')
  np.testing.assert_allclose(apart, plain, rtol=1e-5, atol=1e-4)


def test_what_crosses_replicas_is_the_part_that_a_device_keeps():
  axes = (('vocab', 64), 'embed')
  with jax.set_mesh(mesh := make_mesh(MeshConfig(4, 1, replica=2))):
    table = jax.device_put(draw(64, 16), jax.sharding.NamedSharding(mesh, jax.P('data', None)))
    arrays = table, place(mesh, np.zeros(64, np.int32), 'batch'), place(mesh, draw(64, 16), 'batch', None)
    run = lambda w, ids, dy: jax.vjp(lambda w: lookup(kernel(w, axes, 'float32'), ids, 'batch'), w)[1](dy)[0]
    text = jax.jit(run).lower(*arrays).compile().as_text()
  # Devices i and i + 4 stand in for each other, and send a quarter of the table.
  reduced = re.findall(r'= f32\[(\d+),16\]\S* all-reduce\(.*replica_groups=\{\{0,4\}', text)
  assert reduced == ['16'], text


@pytest.mark.parametrize('mesh', ['8x1'], indirect=True)
@pytest.mark.parametrize('changes', [{'scan': False}, {'scan': False, 'remat': 'full'}, {'scan': True}], ids=str)
def test_stage_3_gathers_a_matrix_for_each_pass_and_keeps_none(style, changes, mesh):
  plan = abstract_model(dataclasses.replace(style, layers=2, mlp_width=80, **changes), 16)
  shardings = plan.shardings(3, mesh)
  parameters = {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[name]) for name, s in plan.shapes.items()}
  tokens = place(mesh, np.zeros((8, 16), np.int32), 'batch', None)
  loss = lambda parameters, tokens: jnp.sum(plan.merge(parameters).hidden(tokens)[0])
  text = jax.jit(jax.grad(loss)).lower(parameters, tokens).compile().as_text()
  gathered = re.findall(r'= f32\[(?:1,)?32,80\]\S* all-gather\(', text)
  # Forward and backward: of each layer, or in the bodies of two loops; the feed-forward layer has one such matrix, or two if gated.
  assert len(gathered) == 2 * (1 if changes['scan'] else 2) * (2 if style.mlp == 'swiglu' else 1), gathered
