"""Causal self-attention: grouped queries, rotary positions, a cache for decoding."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gptjax.config import ModelConfig
from gptjax.model.layers import Linear, Norm, Stack, dropout
from gptjax.sharding import spec

BLOCK = 64
"""Query rows a block: at 64 the skipped half of the square outweighs the smaller products on a CPU."""


class Cache(NamedTuple):
  """Keys and values of the tokens read so far, for one layer or, with a leading axis, for all."""

  keys: Float[Array, '*L B S K C']
  values: Float[Array, '*L B S K C']


class Place(NamedTuple):
  """Where the tokens of a batch stand."""

  positions: Int[Array, 'B T']
  segments: Int[Array, 'B T'] | None = None
  """document of each token; None: a row is one document"""
  filled: Int[Array, ''] | None = None
  """tokens already in the cache; None: no cache"""


def attention_backend(config: ModelConfig) -> str:
  """The implementation that runs: model.attention with 'auto' resolved for this platform."""
  if config.attention != 'auto':
    return config.attention
  return 'blocks' if jax.default_backend() == 'cpu' else 'xla'


def rotate(x: Float[Array, 'B T H C'], positions: Int[Array, 'B T'], theta: float) -> Float[Array, 'B T H C']:
  """Rotary position embedding (arXiv:2104.09864, equation 34): halves of each head turned by position * frequency."""
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions[:, :, None, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attend(q: Float[Array, 'B T H C'], k: Float[Array, 'B S K C'], v: Float[Array, 'B S K C'],
           mask: Bool[Array, '#B T S'], rate: float, key: PRNGKeyArray | None) -> Float[Array, 'B T H C']:
  """softmax(q k / sqrt(C)) v over the keys that `mask` allows (arXiv:1706.03762, equation 1).

  Each key head serves H/K query heads (arXiv:2305.13245). The softmax is in float32.
  """
  b, t, h, c = q.shape
  groups = (b, t, k.shape[2], h // k.shape[2], c)
  q = jax.lax.reshape(q * (1 / math.sqrt(c)), groups, out_sharding=spec('batch', None, 'heads', None, None))
  scores = jnp.einsum('btkgc,bskc->bkgts', q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), -1).astype(v.dtype)
  mixed = jnp.einsum('bkgts,bskc->btkgc', dropout(weights, rate, key), v)
  return jax.lax.reshape(mixed, (b, t, h, c), out_sharding=spec('batch', None, 'heads', None))


def causal_attention(q: Float[Array, 'B T H C'], k: Float[Array, 'B T K C'], v: Float[Array, 'B T K C'],
                     segments: Int[Array, 'B T'] | None, rate: float, key: PRNGKeyArray | None,
                     rows: int) -> Float[Array, 'B T H C']:
  """Attention of each token to itself and those before it in its segment, `rows` query rows at a time.

  A block of rows reads only the keys up to its own end, so nearly half of the square is never computed.
  """
  length = q.shape[1]
  out = []
  for start in range(0, length, rows):
    end = min(start + rows, length)
    mask = (jnp.arange(start, end)[:, None] >= jnp.arange(end))[None]
    if segments is not None:
      mask = mask & (segments[:, start:end, None] == segments[:, None, :end])
    block_key = None if key is None else jax.random.fold_in(key, start)
    out.append(attend(q[:, start:end], k[:, :end], v[:, :end], mask, rate, block_key))
  return jnp.concatenate(out, 1)


class Attention(nnx.Module):
  """Multi-head causal self-attention; activations enter and leave with batch and sequence flattened to one axis."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    self.q = Linear((config.width, queries), ('embed', 'heads'), 0.02, config, rngs, stack)
    self.k = Linear((config.width, keys), ('embed', 'heads'), 0.02, config, rngs, stack)
    self.v = Linear((config.width, keys), ('embed', 'heads'), 0.02, config, rngs, stack)
    # GPT-2 scales what is added to the residual stream by its number of additions, two a layer.
    self.out = Linear((queries, config.width), ('heads', 'embed'), 0.02 / math.sqrt(2 * config.layers), config, rngs, stack)
    self.q_norm = Norm(config.head_width, 'head_width', config, rngs, stack) if config.qk_norm else None
    self.k_norm = Norm(config.head_width, 'head_width', config, rngs, stack) if config.qk_norm else None
    self.config = config

  def __call__(self, x: Float[Array, 'N D'], place: Place, cache: Cache | None,
               key: PRNGKeyArray | None) -> tuple[Float[Array, 'N D'], Cache | None]:
    b, t = place.positions.shape
    heads = lambda y: jax.lax.reshape(y, (b, t, y.shape[1] // self.config.head_width, self.config.head_width),
                                      out_sharding=spec('batch', None, 'heads', None))
    q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    if self.config.positions == 'rope':
      q, k = (rotate(y, place.positions, self.config.rope_theta) for y in (q, k))
    if cache is None:
      rows = BLOCK if attention_backend(self.config) == 'blocks' else t
      y = causal_attention(q, k, v, place.segments, self.config.dropout, key, rows)
    else:
      assert place.filled is not None, 'a cache needs place.filled'
      start = (0, place.filled, 0, 0)
      cache = Cache(jax.lax.dynamic_update_slice(cache.keys, k, start), jax.lax.dynamic_update_slice(cache.values, v, start))
      mask = (place.filled + jnp.arange(t))[:, None] >= jnp.arange(cache.keys.shape[1])
      y = attend(q, cache.keys, cache.values, mask[None], 0.0, None)
    y = jax.lax.reshape(y, (b * t, y.shape[2] * y.shape[3]), out_sharding=spec('batch', 'heads'))
    return self.out(y), cache
