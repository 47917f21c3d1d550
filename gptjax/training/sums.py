"""What an objective gets of a batch, and the sums that it returns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.model import Head, Sums

Batch = dict[str, Any]
"""tokens, targets, mask [B, T] of one device; positions and segments too where documents are isolated. Under context
parallelism the tokens of a row are divided over devices, in the order of `token_order`. In distillation `teacher` has the teacher's
hidden states [B, T, H], and `teacher_head` its FixedHead."""


class ObjectiveSums(NamedTuple):
  """Sums over the tokens of some rows."""

  loss: Float[Array, '']
  """the optimizer gets its gradient, divided by the targets of the complete batch"""
  targets: Float[Array, '']
  """number of targets"""
  metrics: Sums
  """reported per target, or per term; 'loss' is required, in nats, comparable between training and validation"""
  terms: Float[Array, ''] | None = None
  """what loss and metrics are divided by if it is not the number of targets: that of pairs, for example"""

  @property
  def named(self) -> Sums:
    """All but the loss, as a step adds them up."""
    return {'targets': self.targets, **({} if self.terms is None else {'terms': self.terms}), **self.metrics}


ObjectiveFunction = Callable[[Head, Float[Array, 'N D'], Batch], ObjectiveSums]


def reported(batch: Batch) -> Sums:
  """Sums of the entries of a batch that are only reported: those whose names begin with 'metric/'."""
  return {name.removeprefix('metric/'): jnp.sum(value) for name, value in batch.items() if name.startswith('metric/')}
