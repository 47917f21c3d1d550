"""Policy gradients on groups of completions (GRPO, arXiv:2402.03300, and its relatives): advantages, weights of tokens, and the loss.

A row is one completion. With A the advantage of a completion, q the ratio of the probabilities of a token under the model and under the
policy that drew it, and c(q) the ratio clipped, a token's loss is -min(q A, c(q) A). The losses differ in

  grpo     A = (r - mean) / (std + 1e-4)      mean over completions of means over their tokens
  dr_grpo  A = r - mean                       sum over tokens / objective.max_tokens, mean over completions (arXiv:2503.20783)
  dapo     A as grpo                          mean over all tokens of the step (arXiv:2503.14476); c up to 1.28
  gspo     A as grpo                          one ratio per completion, e^(mean of log q); mean over completions (arXiv:2507.18071)
  rloo     A = r - mean of the others         sum over tokens, mean over completions (arXiv:2402.14740); no clipping

mean and std (of n - 1) are those of the rewards r of the completions of the same prompt.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptjax.config import ObjectiveConfig
from gptjax.model import Head
from gptjax.sharding import context_size, tokens_psum
from gptjax.training.sums import Batch, ObjectiveFunction, ObjectiveSums, reported


def advantages(rewards: Float[np.ndarray, 'P G'], loss: str) -> Float[np.ndarray, 'P G']:
  """The advantage of each completion in its group. One whose reward is NaN has 0 and is left out of mean and std; so do all completions of
  a group without spread."""
  known = np.isfinite(rewards)
  count = np.maximum(known.sum(-1, keepdims=True), 1)
  values = np.where(known, rewards, 0.0)
  centered = np.where(known, values - values.sum(-1, keepdims=True) / count, 0.0)
  if loss == 'dr_grpo':
    return centered
  if loss == 'rloo':
    return centered * count / np.maximum(count - 1, 1)
  return centered / (spread(rewards)[:, None] + 1e-4)


def spread(rewards: Float[np.ndarray, 'P G']) -> Float[np.ndarray, 'P']:
  """The standard deviation (of n - 1) of the rewards of each group that are not NaN."""
  known = np.isfinite(rewards)
  count = known.sum(-1)
  values = np.where(known, rewards, 0.0)
  centered = np.where(known, values - (values.sum(-1) / np.maximum(count, 1))[:, None], 0.0)
  return np.sqrt((centered ** 2).sum(-1) / np.maximum(count - 1, 1))


def token_weights(mask: Float[np.ndarray, 'N T'], loss: str, max_tokens: int) -> Float[np.ndarray, 'N T']:
  """Weights of the tokens of all completions of a step, so that the loss is their weighted sum over the number of completions."""
  lengths = np.maximum(mask.sum(-1, keepdims=True), 1)
  factor = {'dr_grpo': 1 / max_tokens, 'rloo': 1.0, 'dapo': len(mask) / max(mask.sum(), 1)}.get(loss, 1 / lengths)
  return (mask * factor).astype(np.float32)


@functools.cache
def policy_gradient(config: ObjectiveConfig) -> ObjectiveFunction:
  """The loss of a batch of completions with `old`, `advantage`, `weight` and, for a divergence, `reference`, all per token.

  Metrics per completion: means over its tokens of the ratio, of the share that is clipped, of the negative log-probability when it was
  drawn (an estimate of the entropy), in nats, and of the divergence `kl`; its length; and all entries of the batch whose names begin with
  'metric/', which have a value at the first token.
  """
  loss = config.loss or 'grpo'
  low = config.clip or (3e-4 if loss == 'gspo' else 0.2)
  high = config.clip_high or {'dapo': 0.28, 'gspo': 4e-4}.get(loss, low)

  def objective(head: Head, hidden: Float[Array, 'N D'], batch: Batch) -> ObjectiveSums:
    mask, advantage = batch['mask'], batch['advantage']
    policy = head.log_probabilities(hidden, batch['targets'].reshape(-1))[0].reshape(mask.shape)
    means = mask / jnp.maximum(_row_sums(mask), 1)
    difference = (policy - batch['old']) * mask
    if loss == 'gspo':
      ratio = jnp.exp(_row_sums(difference * means))
      # Of a complete row, on each device that has a part of it; the gradient is that with respect to the device's own tokens.
      weight, advantage, share = _row_sums(means), _row_sums(means * advantage), context_size()
    else:
      ratio, weight, share = jnp.exp(difference), batch['weight'], 1
    clipped = jnp.clip(ratio, 1 - low, 1 + high)
    gain = ratio * advantage if loss == 'rloo' else jnp.minimum(ratio * advantage, clipped * advantage)
    total = -jnp.sum(weight * gain)
    metrics = {'ratio': jnp.sum(means * ratio), 'clip_share': jnp.sum(means * (ratio * advantage > gain)),
               'entropy': -jnp.sum(means * batch['old']), 'length': jnp.sum(mask), 'loss': total / share}
    if config.kl:
      ahead = (batch['reference'] - policy) * mask
      divergence = jnp.expm1(ahead) - ahead
      total = total + config.kl * jnp.sum(batch['weight'] * divergence)
      metrics |= {'kl': jnp.sum(means * divergence), 'loss': metrics['loss'] + config.kl * jnp.sum(batch['weight'] * divergence)}
    return ObjectiveSums(total, jnp.sum(mask), jax.tree.map(jax.lax.stop_gradient, metrics | reported(batch)), jnp.sum(batch['first']))

  return objective


def _row_sums(values: Float[Array, 'B T']) -> Float[Array, 'B 1']:
  """Sums over complete rows; their gradients are those with respect to this device's tokens."""
  return tokens_psum(values.sum(-1, keepdims=True))

