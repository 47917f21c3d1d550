"""Objectives: functions of the head, the hidden states and the batch, which a step minimizes.

An objective sees the tokens of one device and returns sums over them; the step adds them up over microbatches and devices and divides by
the number of targets, or of other terms. A new one is a function and a name in OBJECTIVES, or in a module of your own.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptjax.config import Config, ObjectiveConfig, entry
from gptjax.model import Head
from gptjax.training.policy import policy_gradient
from gptjax.training.preferences import preference
from gptjax.training.sums import Batch, ObjectiveFunction, ObjectiveSums, reported


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


@functools.cache
def distillation(config: ObjectiveConfig) -> ObjectiveFunction:
  """KL(p || q) of each token's next one, for the probabilities p of a teacher and q of the model; with reverse_kl KL(q || p)
  (arXiv:1503.02531, arXiv:2306.13649).

  Metrics: `kl`, the divergence at config.temperature, in nats, and the cross-entropy of the targets, which is the loss of a batch
  without a teacher, in validation and evaluation.
  """
  entropy, reverse = next_token(), config.loss == 'reverse_kl'

  def objective(head: Head, hidden: Float[Array, 'N D'], batch: Batch) -> ObjectiveSums:
    if 'teacher' not in batch:
      return entropy(head, hidden, batch)
    mask, taught = batch['mask'].reshape(-1), batch['teacher'].reshape(-1, batch['teacher'].shape[-1])
    total, loss = head.divergence(hidden, batch['targets'].reshape(-1), mask, batch['teacher_head'], taught, reverse, config.temperature)
    metrics = {'loss': loss, 'kl': jax.lax.stop_gradient(total) / config.temperature**2}
    return ObjectiveSums(total, jnp.sum(mask), metrics | reported(batch))

  return objective


OBJECTIVES: dict[str, Callable[[Config], ObjectiveFunction]] = {
  'next_token': lambda config: next_token(config.z_loss),
  'sft': lambda config: next_token(config.z_loss),  # the mask of examples has their answers alone
  'preference': lambda config: preference(config.objective),
  'grpo': lambda config: policy_gradient(config.objective),
  'classification': lambda config: classification(config.z_loss),
  'distillation': lambda config: distillation(config.objective),
}
"""By their name in objective.kind."""


def make_objective(config: Config) -> ObjectiveFunction:
  """The objective of a config; raises a UserError if there is none of this name."""
  return entry(OBJECTIVES, 'objective.kind', config.objective.kind)(config)
