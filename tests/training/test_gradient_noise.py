"""The ingredients of the gradient noise scale that a step measures: unbiased, and the same however a batch is divided into equal parts."""

import itertools

import jax
import numpy as np
import optax
import pytest
from tiers import full
from tiny import batch, put, trainer

from gptjax.config import MeshConfig, ModelConfig
from gptjax.sharding import make_mesh
from gptjax.training.step import noise_estimates

MODEL = ModelConfig(layers=1, width=32, heads=4, kv_heads=2, mlp_width=43, vocab_size=51, vocab_multiple=1, tied=False)
STILL = optax.sgd(0.0)
NAMES = 'gradient_square', 'gradient_variance'


def follow(batches, **values):
  """Both estimates of each batch, at the initial parameters; on the mesh in force."""
  state, step = trainer(MODEL, STILL, gradient_noise=True, **values)
  found = []
  for rows in batches:
    state, metrics = step(state, put(rows))
    found.append([metrics[name] for name in NAMES])
  return np.array(found, np.float64)


def picked(rows, order):
  return {name: values[[*order]] for name, values in rows.items()}


def test_estimates_are_unbiased(one_device):
  """The means over all pairs of rows, drawn with repetition, are the square and the variance of the exact gradients of rows."""
  rows = batch(5)
  rows['mask'][:] = 1
  found = follow([picked(rows, pair) for pair in itertools.product(range(5), repeat=2)], microbatches=2).mean(0)
  state, step = trainer(MODEL, optax.sgd(1.0))
  before, gradients = jax.tree.map(np.array, state.trained), []
  for row in range(5):
    state, step = trainer(MODEL, optax.sgd(1.0))
    after, _ = step(state, put(picked(rows, [row])))
    gradients.append(np.concatenate([np.float64(before[name] - after.trained[name]).ravel() for name in before]))
  mean = np.mean(gradients, 0)
  targets = rows['mask'].shape[1]
  variance = np.mean([np.sum((g - mean)**2) for g in gradients]) * targets  # of a row's mean gradient, times its targets
  np.testing.assert_allclose(found, [np.sum(mean**2), variance], rtol=1e-4)


def test_estimates_are_unbiased_for_parts_of_unequal_sizes():
  rng, counts, deviation = np.random.default_rng(0), np.array([3.0, 8.0, 1.0, 20.0]), 2.0
  mean = rng.standard_normal(30)

  def estimates(key):
    noise = deviation * jax.random.normal(key, (4, 30)) * np.sqrt(counts)[:, None]
    s = counts[:, None] * mean + noise
    found = noise_estimates(jax.numpy.float32(4), ((s**2).sum(1) / counts).sum(), jax.numpy.linalg.norm(s.sum(0)) / counts.sum(),
                            jax.numpy.float32(counts.sum()))
    return jax.numpy.stack([found[name] for name in NAMES])

  found = np.asarray(jax.vmap(estimates)(jax.random.split(jax.random.key(0), 4000)))
  error = found.std(0) / np.sqrt(len(found))
  assert (np.abs(found.mean(0) - [mean @ mean, 30 * deviation**2]) < 4 * error).all() and (error < 0.02 * found.mean(0)).all()
  assert np.isnan([*noise_estimates(*map(jax.numpy.float32, (1, 2, 3, 4))).values()]).all()


@pytest.mark.parametrize('mesh, zero_stage, microbatches, parts, order', [
  (MeshConfig(2, 2), 3, 2, 2, [0, 1, 4, 5, 2, 3, 6, 7]),  # each microbatch is summed over both devices of `data`
  full(MeshConfig(2, 2), 2, 2, 2, [0, 1, 4, 5, 2, 3, 6, 7]),
  full(MeshConfig(4, 2), 0, 1, 4, range(8)),
  full(MeshConfig(2, 1), 1, 2, 4, range(8)),
  full(MeshConfig(2, 2, replica=2), 3, 1, 2, range(8))], ids=str)
def test_estimates_are_those_of_one_device_with_the_same_parts(mesh, zero_stage, microbatches, parts, order):
  rows = batch(8)  # with many targets in some parts, and few in others
  with jax.set_mesh(make_mesh(MeshConfig(1, 1), jax.devices()[:1])):
    one = follow([picked(rows, order)], microbatches=parts)
  with jax.set_mesh(make_mesh(mesh, jax.devices()[:mesh.data * mesh.model * mesh.replica])):
    np.testing.assert_allclose(follow([rows], microbatches=microbatches, zero_stage=zero_stage), one, rtol=1e-4)
