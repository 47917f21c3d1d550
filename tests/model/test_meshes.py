"""One model on every mesh: the same logits, loss, gradients and dropout, whatever the devices hold."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiers import full

from gptjax.config import ComputeConfig, MeshConfig
from gptjax.model import Positions, abstract_model
from gptjax.model.layers import dropout
from gptjax.sharding import BATCH_SPEC, batch_shard_map, make_mesh, put_rows, row_numbers
from gptjax.training import next_token
from gptjax.training.step import summed_gradients


@pytest.fixture(scope='module')
def reference():
  """Results of one device by style, kept for the module."""
  return {}


def run(config, compute, mesh, zero_stage, random_parameters):
  """Logits without dropout, gradients with it, and the sums beside them."""
  described = abstract_model(config, compute, 16)
  rng = np.random.default_rng(1)
  text = rng.integers(0, 50, (8, 17), np.int32)
  segments = np.sort(rng.integers(1, 4, (8, 16)), 1).astype(np.int32)
  starts = (segments[:, :, None] > segments[:, None]).sum(-1, dtype=np.int32)
  batch = put_rows(mesh, {
      'tokens': text[:, :-1], 'targets': text[:, 1:], 'segments': segments,
      'positions': np.arange(16, dtype=np.int32) - starts,
      'mask': rng.integers(0, 2, (8, 16)).astype(np.float32)}, 8)
  zero = described.zero(zero_stage, mesh)

  def local_logits(entered, batch):
    module = described.merge(zero.weights(entered, differentiated=False))
    return jax.reshard(module(batch['tokens'], Positions(batch['positions'], batch['segments'])), jax.P(None, None, None))

  @jax.jit
  def everything(parameters, batch, key):
    gradients, sums = summed_gradients(described, next_token(z_loss=1e-3), zero_stage, mesh, 1)(parameters, {}, batch, key)
    return batch_shard_map(local_logits, (zero.in_specs, BATCH_SPEC), BATCH_SPEC)(zero.enter(parameters), batch), sums, gradients

  logits, sums, gradients = everything(random_parameters(described, zero_stage), batch, jax.random.key(2))
  for name, specs in described.specs(zero_stage, mesh).items():
    assert gradients[name].sharding.is_equivalent_to(NamedSharding(mesh, specs.optimizer), gradients[name].ndim)
  return jax.tree.map(np.asarray, (logits, sums, gradients))


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
@pytest.mark.parametrize('mesh, zero_stage', [full('8x1', 3), full('4x2', 0), full('2x4', 3), ('4x2', 3)], indirect=['mesh'])
def test_logits_loss_and_gradients_are_those_of_one_device(style, zero_stage, mesh, random_parameters, reference):
  # The modern style also runs as a scan with blocks recomputed, so that stacked parameters are covered.
  compute = ComputeConfig(scan=True, remat='full') if style.positions == 'rope' else ComputeConfig()
  config = dataclasses.replace(style, dropout=0.1)
  if style not in reference:
    with jax.set_mesh(one := make_mesh(MeshConfig(1, 1))):
      reference[style] = run(config, compute, one, 0, random_parameters)
  expected_logits, expected_sums, expected = reference[style]
  logits, sums, gradients = run(config, compute, mesh, zero_stage, random_parameters)
  np.testing.assert_allclose(logits[..., :50], expected_logits[..., :50], 1e-5, 1e-5)
  for name, value in sums.items():
    np.testing.assert_allclose(value, expected_sums[name], 1e-6)
  for name, gradient in gradients.items():
    np.testing.assert_allclose(gradient, expected[name], 1e-4, 1e-4, err_msg=name)


@pytest.mark.parametrize('mesh', ['4x2'], indirect=True)
@pytest.mark.parametrize('vocab_size', [64, 50])
def test_no_device_holds_logits_of_all_ids(style, vocab_size, mesh, random_parameters):
  described = abstract_model(dataclasses.replace(style, vocab_size=vocab_size), ComputeConfig(), 16)

  def logits(parameters, tokens):
    model = described.merge(parameters)
    return model.head.logits(model.hidden(tokens)[0])

  assert jax.eval_shape(logits, random_parameters(described), jnp.zeros((8, 16), jnp.int32)).sharding.spec == jax.P(None, 'model')


def on_every_mesh(make):
  """Results of make(mesh) on meshes of 1 x 1, 8 x 1 and 4 x 2 devices, as numpy."""
  for sizes in ((1, 1), (8, 1), (4, 2)):
    with jax.set_mesh(mesh := make_mesh(MeshConfig(*sizes))):
      yield jax.tree.map(np.asarray, make(mesh))


@pytest.mark.parametrize('style', ['modern'], indirect=True)
def test_fresh_parameters_are_the_same_on_every_mesh(style):
  described = abstract_model(dataclasses.replace(style, layers=1), ComputeConfig(), 16)

  def fresh(mesh):
    return jax.jit(lambda key: described.initialize(key, described.shardings(3, mesh)))(jax.random.key(5))

  first, *others = on_every_mesh(fresh)
  for parameters in others:
    assert all((parameters[name] == first[name]).all() for name in first)


def test_a_dropout_mask_is_the_same_on_every_mesh_and_each_device_draws_its_rows():
  def local(x, key):
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_numbers(x.shape[0] // 8))  # 8 tokens per row
    return dropout(x, 0.3, keys)

  def dropped(mesh):
    x = jax.device_put(np.ones((1024, 64), np.float32), NamedSharding(mesh, jax.P(*BATCH_SPEC, 'model')))
    program = jax.jit(batch_shard_map(local, (BATCH_SPEC, jax.P()), BATCH_SPEC)).lower(x, jax.random.key(3)).compile()
    # Of one device: the steps from random bits to the mask, each as large as its part of x.
    assert program.memory_analysis().temp_size_in_bytes < 4 * x.nbytes / mesh.size
    return program(x, jax.random.key(3))

  first, *others = on_every_mesh(dropped)
  assert all((other == first).all() for other in others)


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
@pytest.mark.parametrize('mesh', ['8x1'], indirect=True)
def test_under_stage_3_devices_exchange_parameters_and_gradients_never_activations(style, mesh, random_parameters):
  described = abstract_model(dataclasses.replace(style, mlp_width=80), ComputeConfig(), 28)
  rows = put_rows(mesh, {'tokens': np.zeros((16, 28), np.int32), 'targets': np.zeros((16, 28), np.int32),
                         'mask': np.ones((16, 28), np.float32)}, 16)
  step = jax.jit(summed_gradients(described, next_token(), 3, mesh, 1))
  program = step.lower(random_parameters(described, zero_stage=3), {}, rows, jax.random.key(0)).compile().as_text()
  results = ' '.join(match[1] for match in COLLECTIVE.finditer(program))
  exchanged = {tuple(map(int, sizes.split(','))) for sizes in re.findall(r'\w\[([\d,]+)\]', results)}
  stored = described.shardings(3, mesh)
  shapes = {shape.shape for shape in described.shapes.values()}
  shapes |= {stored[name].shard_shape(shape.shape) for name, shape in described.shapes.items()}
  tiles = {(shape[0] // 8, 8, *shape[1:]) for shape in shapes if len(shape) == 2}  # gradients are scattered as tiles of 8 rows
  assert exchanged and exchanged <= shapes | {shape[::-1] for shape in shapes} | tiles


COLLECTIVE = re.compile(r'= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\(')
