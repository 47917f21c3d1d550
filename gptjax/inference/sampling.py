"""Sampling of the next token."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import ModelConfig
from gptjax.config.checks import Fraction, Group, Limit, at_least
from gptjax.data import Tokenizer

_FIRST = 1024
"""Most likely ids that top_k and top_p look at first; at the others only if these do not suffice."""


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


def per_row(sampling: Sampling, rows: int) -> dict[str, Float[np.ndarray, 'B']]:
  """Settings as `sample` takes them, alike for all rows."""
  return {field.name: np.full(rows, getattr(sampling, field.name), np.float32) for field in dataclasses.fields(sampling)}


def penalized(logits: Float[Array, 'B V'], seen: Bool[Array, 'B V'], penalty: Float[Array, 'B']) -> Float[Array, 'B V']:
  """Logits with the repetition penalty of each row applied to the tokens in `seen`."""
  penalty = penalty[:, None]
  return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Float[Array, 'B V'], settings: Mapping[str, Float[Array, 'B']], keys: Key[Array, 'B']) -> Int[Array, 'B']:
  """One token id per row, each drawn with its own key and by its own settings.

  Args:
    logits: after the repetition penalty.
    settings: by the names of Sampling; see `per_row`.
    keys: of the rows.
  """
  best = jnp.argmax(logits, -1)
  temperature = settings['temperature']

  def draw():
    # The maximum is subtracted first, and 1e-30 is still above 0 in float32: tiny temperatures give no NaN.
    scaled = (logits - logits.max(-1, keepdims=True)) / jnp.maximum(temperature, 1e-30)[:, None]
    narrow = (settings['top_k'] > 0) | (settings['top_p'] < 1) | (settings['min_p'] > 0)
    scaled = jax.lax.cond(narrow.any(), _narrowed, lambda scaled, settings: scaled, scaled, settings)
    return jnp.where(temperature == 0, best, jax.vmap(jax.random.categorical)(keys, scaled))
  return jax.lax.cond((temperature > 0).any(), draw, lambda: best)


def _narrowed(scaled: Float[Array, 'B V'], settings: Mapping[str, Float[Array, 'B']]) -> Float[Array, 'B V']:
  """Logits, whose maxima are 0, with -inf for ids that top_k, top_p and min_p of their row leave out."""
  vocab = scaled.shape[-1]
  top_k, top_p, min_p = (settings[name][:, None] for name in ('top_k', 'top_p', 'min_p'))
  count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
  total = jnp.exp(scaled).sum(-1, keepdims=True)

  def lowest(ordered):
    """The lowest logit of each row that top_k and top_p leave, and whether these most likely ones suffice to know it."""
    width = ordered.shape[-1]
    weights = jnp.where(jnp.arange(width) < count, jnp.exp(ordered), 0)
    mass = jnp.cumsum(weights, -1)
    whole = jnp.where(count <= width, mass[:, -1:], total)
    nucleus = (top_p == 1) | (mass - weights < top_p * whole)  # the more likely ones have less than top_p together
    kept = (jnp.arange(width) < count) & nucleus
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
    all_ids = (count == vocab) & (top_p == 1)
    return jnp.where(all_ids, -jnp.inf, least), (all_ids | (count <= width) | ((top_p < 1) & (mass[:, -1:] >= top_p * whole))).all()

  least, suffice = lowest(jax.lax.top_k(scaled, min(_FIRST, vocab))[0])
  if vocab > _FIRST:  # sorting all of 50,000 ids takes twenty times as long
    least = jax.lax.cond(suffice, lambda: least, lambda: lowest(jnp.sort(scaled, -1, descending=True))[0])
  return jnp.where((scaled < least) | (scaled < jnp.log(min_p)), -jnp.inf, scaled)


def suppressed_ids(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
  """Ids that are never generated: bos, padding and unknown, and ids that the model has beyond the tokenizer's."""
  special = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id} - {*tokenizer.stop_ids, None}
  return tuple(i for i in (*special, *range(tokenizer.vocab_size, config.table_rows)) if i < config.table_rows)
