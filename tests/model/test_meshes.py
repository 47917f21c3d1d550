"""One model on every mesh: the same logits, loss, gradients and dropout, whatever the devices hold."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.model import Place, abstract_model
from gptjax.model.layers import dropout
from gptjax.sharding import make_mesh, place, spec
from gptjax.training import next_token


@pytest.fixture(scope='module')
def reference():
  """Results of one device by style, kept for the module."""
  return {}


def run(config, mesh, zero_stage, random_parameters):
  """Logits without dropout, loss and gradients with it, and the gradients' shardings."""
  plan = abstract_model(config, 16)
  rng = np.random.default_rng(1)
  text = rng.integers(0, 50, (8, 17), np.int32)
  segments = np.sort(rng.integers(1, 4, (8, 16)), 1).astype(np.int32)
  starts = (segments[:, :, None] > segments[:, None]).sum(-1, dtype=np.int32)
  batch = place(mesh, {
      'tokens': text[:, :-1], 'targets': text[:, 1:], 'segments': segments,
      'positions': np.arange(16, dtype=np.int32) - starts,
      'mask': rng.integers(0, 2, (8, 16)).astype(np.float32)}, 'batch', None)
  parameters = random_parameters(plan, zero_stage)

  @jax.jit
  def everything(parameters, batch, key):
    def loss(parameters):
      total, count, _ = next_token(z_loss=1e-3)(plan.merge(parameters), batch, key)
      return total / count
    logits = plan.merge(parameters)(batch['tokens'], Place(batch['positions'], batch['segments']))
    return logits, *jax.value_and_grad(loss)(parameters)

  logits, loss, gradients = everything(parameters, batch, jax.random.key(2))
  stored = plan.shardings(zero_stage, mesh)
  assert all(gradients[name].sharding.is_equivalent_to(stored[name], gradients[name].ndim) for name in gradients)
  return jax.tree.map(np.asarray, (logits, loss, gradients))


@pytest.mark.parametrize('mesh, zero_stage', [('8x1', 3), ('4x2', 0), ('4x2', 3)], indirect=['mesh'])
def test_logits_loss_and_gradients_are_those_of_one_device(style, zero_stage, mesh, random_parameters, reference):
  # The modern style also runs as a scan with blocks recomputed, so that stacked parameters are covered.
  modern = {'scan': True, 'remat': 'full'} if style.positions == 'rope' else {}
  config = dataclasses.replace(style, dropout=0.1, **modern)
  if style not in reference:
    with jax.set_mesh(one := make_mesh(MeshConfig(1, 1))):
      reference[style] = run(config, one, 0, random_parameters)
  expected_logits, expected_loss, expected = reference[style]
  logits, loss, gradients = run(config, mesh, zero_stage, random_parameters)
  np.testing.assert_allclose(logits[..., :50], expected_logits[..., :50], 1e-5, 1e-5)
  np.testing.assert_allclose(loss, expected_loss, 1e-6)
  for name, gradient in gradients.items():
    np.testing.assert_allclose(gradient, expected[name], 1e-4, 1e-6, err_msg=name)


@pytest.mark.parametrize('mesh', ['4x2'], indirect=True)
@pytest.mark.parametrize('vocab_size', [64, 50])
def test_no_device_holds_logits_of_all_ids(style, vocab_size, mesh, random_parameters):
  plan = abstract_model(dataclasses.replace(style, vocab_size=vocab_size), 16)

  def logits(parameters, tokens):
    model = plan.merge(parameters)
    return model.logits(model.hidden(tokens)[0])

  tokens = place(mesh, np.zeros((8, 16), np.int32), 'batch', None)
  assert jax.eval_shape(logits, random_parameters(plan), tokens).sharding.spec == spec('batch', 'vocab')


def on_every_mesh(make):
  """Results of make(mesh) on meshes of 1 x 1, 8 x 1 and 4 x 2 devices, as numpy."""
  for sizes in ((1, 1), (8, 1), (4, 2)):
    with jax.set_mesh(mesh := make_mesh(MeshConfig(*sizes))):
      yield jax.tree.map(np.asarray, make(mesh))


@pytest.mark.parametrize('style', ['modern'], indirect=True)
def test_fresh_parameters_are_the_same_on_every_mesh(style):
  plan = abstract_model(dataclasses.replace(style, layers=1), 16)

  def fresh(mesh):
    return jax.jit(lambda key: plan.initialize(key, plan.shardings(3, mesh)))(jax.random.key(5))

  first, *others = on_every_mesh(fresh)
  for parameters in others:
    assert all((parameters[name] == first[name]).all() for name in first)


def test_a_dropout_mask_is_the_same_on_every_mesh_and_each_device_draws_its_part():
  run = jax.jit(lambda x: dropout(x, 0.3, jax.random.key(3)))

  def dropped(mesh):
    x = place(mesh, np.ones((1024, 64), np.float32), 'batch', 'mlp')
    program = run.lower(x).compile()
    # Of one device: the steps from random bits to the mask, each as large as its part of x.
    assert program.memory_analysis().temp_size_in_bytes < 4 * x.nbytes / mesh.size
    return program(x)

  first, *others = on_every_mesh(dropped)
  assert all((other == first).all() for other in others)


COLLECTIVE = re.compile(r'= (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)(-start)?\(')


@pytest.mark.parametrize('mesh', ['8x1'], indirect=True)
def test_under_stage_3_devices_exchange_parameters_and_gradients_never_activations(style, mesh, random_parameters):
  plan = abstract_model(dataclasses.replace(style, mlp_width=80), 28)
  parameters = random_parameters(plan, zero_stage=3)
  tokens = place(mesh, np.zeros((16, 28), np.int32), 'batch', None)
  loss = lambda parameters, tokens: jnp.sum(plan.merge(parameters).hidden(tokens)[0])
  program = jax.jit(jax.grad(loss)).lower(parameters, tokens).compile().as_text()
  results = ' '.join(match[1] for match in COLLECTIVE.finditer(program))
  exchanged = {tuple(map(int, sizes.split(','))) for sizes in re.findall(r'\w\[([\d,]+)\]', results)}
  stored = plan.shardings(3, mesh)
  shapes = {shape.shape for shape in plan.shapes.values()} | {stored[name].shard_shape(shape.shape) for name, shape in plan.shapes.items()}
  assert exchanged and exchanged <= shapes | {shape[::-1] for shape in shapes}
