"""What is minimized: functions (model, batch, key) -> (summed loss, count of targets, summed metrics)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptjax.model import Place, Transformer
from gptjax.sharding import spec

Batch = dict[str, Array]
"""tokens, targets, mask [B, T]; positions and segments too where documents are isolated."""

Objective = Callable[[Transformer, Batch, PRNGKeyArray | None], tuple[Array, Array, dict[str, Array]]]


def cross_entropy(logits: Float[Array, 'N V'], targets: Int[Array, 'N']) -> tuple[Float[Array, 'N'], Float[Array, 'N']]:
  """-log softmax(logits)[target] in nats, and the log-normalizer it is computed with.

  The target's logit is picked by comparison, not by index, so that the vocabulary may lie split over `model`.
  """
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1, out_sharding=spec('batch', 'vocab'))
  normalizer = jax.nn.logsumexp(logits, -1)
  return normalizer - jnp.sum(jnp.where(ids == targets[:, None], logits, 0), -1), normalizer


def next_token(z_loss: float = 0.0) -> Objective:
  """Cross-entropy of each target token, plus z_loss * log(Z)^2 (arXiv:2204.02311, section 5)."""

  def objective(model, batch, key):
    place = Place(batch['positions'], batch['segments']) if 'segments' in batch else None
    hidden, _ = model.hidden(batch['tokens'], place, key=key)
    flat = lambda x: jax.lax.reshape(x, (x.size,), out_sharding=spec('batch'))
    losses, normalizer = cross_entropy(model.logits(hidden), flat(batch['targets']))
    mask = flat(batch['mask'])
    loss = jnp.sum(losses * mask)
    total = loss + z_loss * jnp.sum(jnp.square(normalizer) * mask) if z_loss else loss
    return total, jnp.sum(mask), {'loss': loss}

  return objective
