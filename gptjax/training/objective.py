"""What is minimized: functions (model, batch, key) -> (summed loss, count of targets, summed metrics)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from gptjax.model import Place, Transformer
from gptjax.sharding import spec

Batch = dict[str, Array]
"""tokens, targets, mask [B, T]; positions and segments too where documents are isolated."""

Objective = Callable[[Transformer, Batch, PRNGKeyArray | None], tuple[Array, Array, dict[str, Array]]]


@functools.lru_cache(maxsize=16)
def next_token(z_loss: float = 0.0) -> Objective:
  """Cross-entropy of each target token, plus z_loss * log(Z)^2 (arXiv:2204.02311, section 5)."""

  def objective(model, batch, key):
    place = Place(batch['positions'], batch['segments']) if 'segments' in batch else None
    hidden, _ = model.hidden(batch['tokens'], place, key=key)
    flat = lambda x: jax.lax.reshape(x, (x.size,), out_sharding=spec('batch'))
    mask = flat(batch['mask'])
    total, loss = model.loss(hidden, flat(batch['targets']), mask, z_loss)
    return total, jnp.sum(mask), {'loss': loss}

  return objective
