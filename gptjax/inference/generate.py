"""Sampling text: a key/value cache, and the usual ways to narrow the distribution."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptjax.config import ModelConfig, UserError
from gptjax.data import TextStream, Tokenizer
from gptjax.model import Blueprint, Cache, Parameters, Place, empty_cache
from gptjax.sharding import spec


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn."""

  temperature: float = 0.8
  """logits are divided by it; 0: always the likeliest token"""
  top_k: int = 0
  """only the k likeliest tokens; 0: all"""
  top_p: float = 1.0
  """only the likeliest tokens that together have this probability (arXiv:1904.09751); 1: all"""

  def __post_init__(self):
    if not 0 <= self.temperature < math.inf:
      raise UserError('--temperature', self.temperature, 'a number from 0 on')
    if self.top_k < 0:
      raise UserError('--top_k', self.top_k, '0 or more')
    if not 0 < self.top_p <= 1:
      raise UserError('--top_p', self.top_p, 'above 0 and at most 1')


def sample(logits: Float[Array, 'B V'], sampling: Sampling, key: PRNGKeyArray) -> Int[Array, 'B']:
  """One token id a row."""
  if sampling.temperature == 0:
    return jnp.argmax(logits, -1)
  logits = logits / sampling.temperature
  ordered = jnp.sort(logits, -1, descending=True)
  if 0 < sampling.top_k < logits.shape[-1]:
    logits = jnp.where(logits < ordered[:, sampling.top_k - 1, None], -jnp.inf, logits)
    ordered = jnp.where(jnp.arange(logits.shape[-1]) < sampling.top_k, ordered, -jnp.inf)
  if sampling.top_p < 1:
    probabilities = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities  # a token stays if those above it do not reach top_p
    lowest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < lowest, -jnp.inf, logits)
  return jax.random.categorical(key, logits)


class _Read(NamedTuple):
  """What the model has read so far."""

  layers: Cache
  filled: Int[Array, '']


def never_drawn(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
  """Ids that no text continues with: padding, unknown, and those that the model has beyond the tokenizer's."""
  special = {tokenizer.pad_id, tokenizer.unk_id} - {tokenizer.eos_id, None}
  return (*special, *range(tokenizer.vocab_size, config.table_rows))


class Generator:
  """Continues a prompt token by token, with one compiled program for the prompt and one for each further token.

  Args:
    blueprint: of the model; its context is the size of the cache.
    mesh: where the parameters lie.
    sampling: how tokens are drawn.
    forbidden: ids never drawn, such as padding.
  """

  def __init__(self, blueprint: Blueprint, mesh: Mesh, sampling: Sampling, forbidden: tuple[int, ...] = ()):
    self._context = blueprint.context
    rows = mesh.shape['replica'] * mesh.shape['data']  # one sequence, the same on every device that a batch is shared over

    def read(parameters, tokens, count, cache):
      # tokens [T] of which `count` are real; what the rest leaves in the cache is overwritten before it is seen.
      model = blueprint.merge(parameters)
      spread = lambda x: jax.reshard(jnp.broadcast_to(x, (rows, *x.shape)), spec('batch', None))
      place = Place(spread(cache.filled + jnp.arange(tokens.shape[0])), filled=cache.filled)
      hidden, layers = model.hidden(spread(tokens), place, cache.layers)
      hidden = jax.lax.reshape(hidden, (rows, tokens.shape[0], hidden.shape[-1]), out_sharding=spec('batch', None, 'embed'))
      last = jax.lax.dynamic_index_in_dim(hidden, count - 1, 1, keepdims=False)
      logits = jax.reshard(model.logits(last), PartitionSpec(None, None))[:1]
      return logits.at[:, jnp.array(forbidden, jnp.int32)].set(-jnp.inf), _Read(layers, cache.filled + count)

    def draw(logits, key, index):
      return sample(logits, sampling, jax.random.fold_in(key, index))

    self._read = jax.jit(read, donate_argnums=3)
    self._draw = jax.jit(draw)
    self._empty = jax.jit(lambda: _Read(empty_cache(blueprint.config, rows, self._context), jnp.int32(0)))

  def __call__(self, parameters: Parameters, prompt: list[int], key: PRNGKeyArray) -> Iterator[int]:
    """Yields ids without end. The text may outgrow the context: then the model goes on from the later half of it."""
    assert prompt, 'a prompt has at least its bos'
    tokens = list(prompt)
    logits, cache = self._prefill(parameters, tokens[-self._context:])
    filled = min(len(tokens), self._context)
    while True:
      token = int(self._draw(logits, key, len(tokens))[0])
      tokens.append(token)
      yield token
      if filled == self._context:
        kept = tokens[-max(self._context // 2, 1):]
        logits, cache = self._prefill(parameters, kept)
        filled = len(kept)
      else:
        logits, cache = self._read(parameters, np.array([token], np.int32), 1, cache)
        filled += 1

  def text(self, parameters: Parameters, tokenizer: Tokenizer, prompt: str, tokens: int, key: PRNGKeyArray) -> Iterator[str]:
    """Yields pieces of text that continue a prompt, as they come: at most `tokens` ids, none after eos."""
    stream = TextStream(tokenizer)
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt, '--prompt').tolist()]
    for token in itertools.islice(self(parameters, ids, key), tokens):
      if token == tokenizer.eos_id:
        break
      yield stream.push([token])
    yield stream.finish()

  def _prefill(self, parameters, tokens: list[int]):
    padded = np.zeros(self._context, np.int32)
    padded[:len(tokens)] = tokens
    return self._read(parameters, padded, len(tokens), self._empty())
