"""Objectives: functions of the head, the hidden states and the batch, which a step minimizes.

An objective sees the tokens of one device and returns sums over them; the step adds them up over microbatches and devices and divides by
the number of targets, or of other terms. A new one is a function and a name in OBJECTIVES.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.config import Config, UserError
from gptjax.model import Head
from gptjax.training.policy import policy_gradient
from gptjax.training.preferences import preference
from gptjax.training.sums import Batch, ObjectiveFunction, ObjectiveSums


@functools.cache
def next_token(z_loss: float = 0.0) -> ObjectiveFunction:
  """Cross-entropy of each target token, plus z_loss * log(Z)^2 (arXiv:2204.02311, section 5)."""

  def objective(head: Head, hidden: Float[Array, 'N D'], batch: Batch) -> ObjectiveSums:
    mask = batch['mask'].reshape(-1)
    total, loss = head.cross_entropy(hidden, batch['targets'].reshape(-1), mask, z_loss)
    return ObjectiveSums(total, jnp.sum(mask), {'loss': loss})

  return objective


@functools.cache
def classification(z_loss: float = 0.0) -> ObjectiveFunction:
  """Cross-entropy of the class of each text, which is the target of its last token, and the fraction of texts whose class is predicted."""
  entropy = next_token(z_loss)

  def objective(head: Head, hidden: Float[Array, 'N D'], batch: Batch) -> ObjectiveSums:
    sums = entropy(head, hidden, batch)
    _, right = head.log_probabilities(jax.lax.stop_gradient(hidden), batch['targets'].reshape(-1))
    return sums._replace(metrics=sums.metrics | {'accuracy': jnp.sum(batch['mask'].reshape(-1) * right)})

  return objective


OBJECTIVES: dict[str, Callable[[Config], ObjectiveFunction]] = {
  'next_token': lambda config: next_token(config.z_loss),
  'sft': lambda config: next_token(config.z_loss),  # the mask of examples has their answers alone
  'preference': lambda config: preference(config.objective),
  'grpo': lambda config: policy_gradient(config.objective),
  'classification': lambda config: classification(config.z_loss),
}
"""By their name in objective.kind."""


def make_objective(config: Config) -> ObjectiveFunction:
  """The objective of a config; raises a UserError if it has no such name."""
  kind = config.objective.kind
  if kind not in OBJECTIVES:
    raise UserError('objective.kind', kind, ', '.join(OBJECTIVES), list(OBJECTIVES))
  return OBJECTIVES[kind](config)
