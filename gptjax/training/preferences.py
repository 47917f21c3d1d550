"""Losses on pairs of answers: how much more likely than a reference the model makes the chosen answer, and the rejected one.

Of an answer, s = sum of log p over its tokens, its end included, and m = s / number of these tokens; r is s, or m where a loss says
'mean', minus the same of the reference; a reward is beta * r, w of the chosen and l of the rejected answer. All losses are means over
pairs. sigma is the logistic function, L its logarithm.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float, Int

from gptjax.config import BATCH_AXES, ObjectiveConfig
from gptjax.model import Head
from gptjax.sharding import batch_psum, context_size, tokens_psum
from gptjax.training.sums import Batch, ObjectiveFunction, ObjectiveSums


class Pairs(NamedTuple):
  """What a loss reads of pairs [B, P]."""

  chosen: Float[Array, 'B P']
  """w"""
  rejected: Float[Array, 'B P']
  """l"""
  likelihood: Float[Array, 'B P 2']
  """m of both"""
  divergence: Float[Array, '']
  """kto: KL divergence from the reference in nats, at least 0: the mean of r over mismatched prompts and answers of the microbatch"""


def _dpo(pairs: Pairs, config: ObjectiveConfig) -> Float[Array, 'B P']:
  """-(1 - e) L(w - l) - e L(l - w), e = smoothing (DPO, arXiv:2305.18290, equation 7; with e cDPO)."""
  gap, e = pairs.chosen - pairs.rejected, config.smoothing
  return -(1 - e) * log_sigmoid(gap) - e * log_sigmoid(-gap)


def _robust(pairs: Pairs, config: ObjectiveConfig) -> Float[Array, 'B P']:
  """(-(1 - e) L(w - l) + e L(l - w)) / (1 - 2 e) (arXiv:2403.00409, equation 12)."""
  gap, e = pairs.chosen - pairs.rejected, config.smoothing
  return (-(1 - e) * log_sigmoid(gap) + e * log_sigmoid(-gap)) / (1 - 2 * e)


def _hinge(pairs: Pairs, config: ObjectiveConfig) -> Float[Array, 'B P']:
  """max(0, 1 - (w - l)) (SLiC, arXiv:2305.10425)."""
  return jax.nn.relu(1 - (pairs.chosen - pairs.rejected))


def _ipo(pairs: Pairs, config: ObjectiveConfig) -> Float[Array, 'B P']:
  """((w - l) / beta - 1 / (2 beta))^2 (arXiv:2310.12036, equation 17); mean."""
  return jnp.square((pairs.chosen - pairs.rejected - 0.5) / config.beta)


def _apo_zero(pairs: Pairs, config: ObjectiveConfig) -> Float[Array, 'B P']:
  """1 - sigma(w) + sigma(l) (arXiv:2408.06266, equation 5)."""
  return 1 - sigmoid(pairs.chosen) + sigmoid(pairs.rejected)


def _apo_down(pairs: Pairs, config: ObjectiveConfig) -> Float[Array, 'B P']:
  """sigma(w) + 1 - sigma(w - l) (arXiv:2408.06266, equation 6)."""
  return sigmoid(pairs.chosen) + 1 - sigmoid(pairs.chosen - pairs.rejected)


def _kto(pairs: Pairs, config: ObjectiveConfig) -> Float[Array, 'B P']:
  """The mean of 1 - sigma(w - z) and 1 - sigma(z - l), z = beta * divergence (arXiv:2402.01306, equation 8, both weights 1)."""
  z = config.beta * pairs.divergence
  return (2 - sigmoid(pairs.chosen - z) - sigmoid(z - pairs.rejected)) / 2


def _simpo(pairs: Pairs, config: ObjectiveConfig) -> Float[Array, 'B P']:
  """-L(w - l - margin), without a reference (arXiv:2405.14734, equation 6); mean."""
  return -log_sigmoid(pairs.chosen - pairs.rejected - config.margin)


def _orpo(pairs: Pairs, config: ObjectiveConfig) -> Float[Array, 'B P']:
  """-m of the chosen answer - beta L(difference of the log odds m - log(1 - e^m)) (arXiv:2403.07691, equation 6); mean, without a
  reference. The first term is that of the answer alone; the authors' includes the prompt."""
  m = jnp.minimum(pairs.likelihood, -1e-6)  # an answer that is certain has no odds
  odds = m - jnp.log(-jnp.expm1(m))
  return -pairs.likelihood[..., 0] - config.beta * log_sigmoid(odds[..., 0] - odds[..., 1])


LOSSES: dict[str, Callable[[Pairs, ObjectiveConfig], Float[Array, 'B P']]] = {
  'dpo': _dpo, 'robust': _robust, 'hinge': _hinge, 'ipo': _ipo, 'dpo_norm': _dpo, 'apo_zero': _apo_zero, 'apo_down': _apo_down,
  'kto': _kto, 'simpo': _simpo, 'orpo': _orpo}
"""By their name in objective.loss."""
EQUAL = 1e-4
"""Rewards count as equal if the differences r that they come from, in nats, are: rounding makes smaller ones."""
MEANS = ('ipo', 'dpo_norm', 'simpo', 'orpo')
"""Losses with r of means over tokens; dpo_norm is DPO with these (arXiv:2411.15124, section 5.1.2)."""


@functools.cache
def preference(config: ObjectiveConfig) -> ObjectiveFunction:
  """The loss `config.loss` on pairs: odd parts of a row are chosen answers, even ones rejected; of kto, every third is mismatched.

  Metrics per pair: rewards, their difference `margin`, `accuracy` (1 if the chosen answer has the higher reward, 1/2 if both are equal),
  lengths in tokens, and with a reference `kl`, an estimate of its divergence in nats: the sum over tokens of both answers of d^2 / 2,
  d = log p - log p of the reference.
  """
  loss, mean, has_reference = LOSSES[config.loss or 'dpo'], config.loss in MEANS, config.needs_reference
  parts = 3 if config.loss == 'kto' else 2

  def objective(head: Head, hidden: Float[Array, 'N D'], batch: Batch) -> ObjectiveSums:
    mask = batch['mask']
    policy = head.log_probabilities(hidden, batch['targets'].reshape(-1))[0].reshape(mask.shape)
    reference = batch['reference'] if has_reference else jnp.zeros_like(mask)
    sums = lambda values: _part_sums(values * mask, batch['segments'], parts)
    lengths, likelihood = sums(jnp.ones_like(mask)), sums(policy)
    counted, ratio = (lengths > 0).all(-1), sums(policy - reference)  # more exact than the difference of the sums
    per_token = 1 / jnp.maximum(lengths, 1)
    divergence = jnp.float32(0)
    if parts == 3:
      total, count = batch_psum((jnp.sum(ratio[..., 2] * counted), jnp.sum(counted)), BATCH_AXES)
      divergence = jax.lax.stop_gradient(jax.nn.relu(total / jnp.maximum(count, 1)))
    rewards = config.beta * (ratio * per_token if mean else ratio)[..., :2]
    pairs = Pairs(rewards[..., 0], rewards[..., 1], (likelihood * per_token)[..., :2], divergence)
    losses = loss(pairs, config) - config.chosen_weight * pairs.likelihood[..., 0]
    kl = sums(jnp.square(policy - reference) / 2)[..., :2].sum(-1)
    gap = pairs.chosen - pairs.rejected
    metrics = {'loss': losses, 'reward_chosen': pairs.chosen, 'reward_rejected': pairs.rejected, 'margin': gap,
               'accuracy': (jnp.sign(jnp.where(jnp.abs(gap) < config.beta * EQUAL, 0, gap)) + 1) / 2,
               'length_chosen': lengths[..., 0], 'length_rejected': lengths[..., 1]}
    metrics |= ({'kl': kl} if has_reference else {}) | ({'divergence': jnp.broadcast_to(divergence, kl.shape)} if parts == 3 else {})
    total = lambda values: jnp.sum(jnp.where(counted, values, 0))
    shared = {name: jax.lax.stop_gradient(total(values)) / context_size() for name, values in metrics.items()}
    answers = jnp.sum(mask * (batch['segments'] % parts != 0)) if parts == 3 else jnp.sum(mask)
    return ObjectiveSums(total(losses), answers, shared, jnp.sum(counted) / context_size())

  return objective


def _part_sums(values: Float[Array, 'B T'], segments: Int[Array, 'B T'], parts: int) -> Float[Array, 'B P S']:
  """Sums over the tokens of each part of a row's pairs, S parts each. Devices that share rows all get the sums of complete rows, and
  gradients with respect to their own tokens."""
  rows = jnp.arange(len(values))[:, None]
  size = values.shape[1] * context_size() // (2 * parts)  # a part has two tokens or more
  own = jnp.zeros((len(values), 1 + size * parts), values.dtype).at[rows, segments].add(values)
  return tokens_psum(own)[:, 1:].reshape(len(values), size, parts)
