"""Sampling of the next token."""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import ModelConfig
from gptjax.config.checks import Fraction, Group, Limit, at_least
from gptjax.data import Tokenizer


@dataclasses.dataclass(frozen=True)
class Sampling(Group, prefix='--'):
  """The distribution of the next token: the model's, modified by repetition penalty, temperature, top_k, top_p and min_p, in this order."""

  temperature: Annotated[float, Limit(lambda value: 0 <= value < math.inf, 'a number of at least 0')] = 0.8
  """logits are divided by it; 0: always the most likely token"""
  top_k: Annotated[int, at_least(0)] = 0
  """only the k most likely tokens, and those as likely as the k-th; 0: all"""
  top_p: Annotated[float, Limit(lambda value: 0 < value <= 1, 'above 0 and at most 1')] = 1.0
  """only the most likely tokens that together have this probability (arXiv:1904.09751); 1: all"""
  min_p: Fraction = 0.0
  """only tokens with at least this fraction of the highest probability (arXiv:2407.01082); 0: all"""
  repetition_penalty: Annotated[float, Limit(lambda value: 0 < value < math.inf, 'a number above 0')] = 1.0
  """positive logits of tokens that the text contains are divided by it, negative ones multiplied (arXiv:1909.05858); 1: no penalty"""


def penalized(logits: Float[Array, 'B V'], seen: Bool[Array, 'B V'], sampling: Sampling) -> Float[Array, 'B V']:
  """Logits with the repetition penalty applied to the tokens in `seen`."""
  penalty = sampling.repetition_penalty
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Float[Array, 'B V'], sampling: Sampling, keys: Key[Array, 'B']) -> Int[Array, 'B']:
  """One token id per row, each drawn with its own key."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, -1)
  # The maximum is subtracted first, and 1e-30 is still above 0 in float32: tiny temperatures give no NaN.
  logits = (logits - logits.max(-1, keepdims=True)) / max(sampling.temperature, 1e-30)
  narrow = 0 < sampling.top_k < logits.shape[-1]
  if narrow or sampling.top_p < 1:
    ordered = jax.lax.top_k(logits, sampling.top_k)[0] if narrow else jnp.sort(logits, -1, descending=True)
    lowest = ordered[:, -1:] if narrow else -jnp.inf
    if sampling.top_p < 1:
      probabilities = jax.nn.softmax(ordered, -1)
      before = jnp.cumsum(probabilities, -1) - probabilities  # keep a token if the more likely ones sum to less than top_p
      lowest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  if sampling.min_p:
    logits = jnp.where(logits < logits.max(-1, keepdims=True) + math.log(sampling.min_p), -jnp.inf, logits)
  return jax.vmap(jax.random.categorical)(keys, logits)


def suppressed_ids(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
  """Ids that are never generated: bos, padding and unknown, and ids that the model has beyond the tokenizer's."""
  special = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id} - {*tokenizer.stop_ids, None}
  return tuple(i for i in (*special, *range(tokenizer.vocab_size, config.table_rows)) if i < config.table_rows)
