"""The loss and its gradient are what numpy says, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batch, put

from gptjax.sharding import place, spec
from gptjax.training import cross_entropy, next_token

ROWS, CONTEXT, IDS = 8, 4, 32


def logits(scale=3.0):
  """[N, V] with a few ids that are only padding of the table."""
  values = np.random.default_rng(0).standard_normal((ROWS * CONTEXT, IDS)) * scale
  values[:, -3:] = -1e30
  return values.astype(np.float32)


def reference(logits, targets):
  """(losses, log-normalizers, probabilities) in float64."""
  exact = logits.astype(np.float64)
  highest = exact.max(-1)
  normalizer = highest + np.log(np.exp(exact - highest[:, None]).sum(-1))
  losses = normalizer - exact[np.arange(len(targets)), targets]
  return losses, normalizer, np.exp(exact - normalizer[:, None])


def examples():
  return batch(ROWS, CONTEXT, IDS - 3)


def objective(z_loss):
  """next_token as a function of logits [N, V]; the model just returns them."""
  class Model:
    def hidden(self, tokens, place, key):
      return self.values, None

    def logits(self, hidden):
      return hidden

  def loss(values, rows):
    model = Model()
    model.values = values
    total, count, metrics = next_token(z_loss)(model, rows, None)
    return total, (count, metrics)

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize('scale', [0.1, 30.0, 1e4])
def test_cross_entropy_is_the_negative_log_probability(scale, mesh):
  targets = examples()['targets'].ravel()
  placed = place(mesh, logits(scale), 'batch', 'vocab'), place(mesh, targets, 'batch')
  losses, normalizer = jax.jit(cross_entropy)(*placed)
  expected = reference(logits(scale), targets)
  np.testing.assert_allclose(losses, expected[0], rtol=1e-6, atol=1e-6 * scale)
  np.testing.assert_allclose(normalizer, expected[1], rtol=1e-6)
  assert jax.typeof(losses).sharding.spec == spec('batch')


@pytest.mark.parametrize('z_loss', [0.0, 0.01])
def test_the_objective_sums_over_targets_and_has_the_right_gradient(z_loss, mesh):
  rows = examples()
  (total, (count, metrics)), gradient = objective(z_loss)(place(mesh, logits(), 'batch', 'vocab'), put(rows))
  targets, mask = rows['targets'].ravel(), rows['mask'].ravel()
  losses, normalizer, probabilities = reference(logits(), targets)
  assert count == mask.sum() and 0 < count < mask.size
  np.testing.assert_allclose(metrics['loss'], (losses * mask).sum(), rtol=1e-6)
  np.testing.assert_allclose(total, ((losses + z_loss * normalizer**2) * mask).sum(), rtol=1e-6)
  one_hot = np.eye(IDS)[targets]
  expected = (probabilities - one_hot + 2 * z_loss * normalizer[:, None] * probabilities) * mask[:, None]
  np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_targets_that_do_not_count_have_no_say(one_device):
  rows = examples()
  other = rows | {'targets': np.where(rows['mask'] == 0, 5, rows['targets']).astype(np.int32)}
  (first, _), first_gradient = objective(0.1)(jnp.asarray(logits()), put(rows))
  (second, _), second_gradient = objective(0.1)(jnp.asarray(logits()), put(other))
  assert first == second and (first_gradient == second_gradient).all()
