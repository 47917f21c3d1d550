"""Causal self-attention: grouped queries, rotary positions, a cache for decoding."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gptjax.config import ModelConfig
from gptjax.model.kernels import KERNELS, attention_backend
from gptjax.model.layers import Linear, Norm, dropout
from gptjax.model.weights import Stack
from gptjax.sharding import Axis, spec

BLOCK = 64
"""Query rows a block: at 64 the skipped half of the square outweighs the smaller products on a CPU."""

PARTS = 8
"""Parts of a row whose keys end at their own end: with 8, 9/16 of the square is computed where 1/2 is needed."""


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
  q = jax.lax.reshape(q * (1 / math.sqrt(c)), groups, out_sharding=spec('batch', None, ('heads', h), None, None))
  scores = jnp.einsum('btkgc,bskc->bkgts', q, k, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), -1).astype(v.dtype)
  mixed = jnp.einsum('bkgts,bskc->btkgc', dropout(weights, rate, key), v)
  return jax.lax.reshape(mixed, (b, t, h, c), out_sharding=spec('batch', None, ('heads', h), None))


def causal_attention(q: Float[Array, 'B T H C'], k: Float[Array, 'B T K C'], v: Float[Array, 'B T K C'],
                     segments: Int[Array, 'B T'] | None, rate: float, key: PRNGKeyArray | None,
                     rows: int) -> Float[Array, 'B T H C']:
  """Attention of each token to itself and those before it in its segment, `rows` query rows at a time.

  A block of rows reads only the keys up to its own end, or in rows of more than PARTS blocks up to the end of its part: nearly half
  of the square is never computed. The blocks of a part run one after the other and are computed again in the backward pass, so that
  memory grows with the context and not with its square.
  """
  length = q.shape[1]

  def block(start, end, q, own_segments):
    mask = ((start + jnp.arange(q.shape[1]))[:, None] >= jnp.arange(end))[None]
    if segments is not None:
      mask = mask & (own_segments[:, :, None] == segments[:, None, :end])
    return attend(q, k[:, :end], v[:, :end], mask, rate, None if key is None else jax.random.fold_in(key, start))

  def plain(start, end):
    return block(start, end, q[:, start:end], None if segments is None else segments[:, start:end])

  out = []
  step = -(-length // (rows * PARTS)) * rows
  for start in range(0, length, step):
    end = min(start + step, length)
    count = (end - start) // rows
    middle = start
    if count > 1:
      middle = start + count * rows
      # [B, count * rows, ...] as [count, B, rows, ...]
      cut = lambda x: jnp.swapaxes(x[:, start:middle].reshape(x.shape[0], count, rows, *x.shape[2:]), 0, 1)
      starts = start + rows * jnp.arange(count)
      inputs = (starts, cut(q), None if segments is None else cut(segments))
      again = jax.checkpoint(lambda _, part: (None, block(part[0], end, *part[1:])), prevent_cse=False)
      mixed = jnp.swapaxes(jax.lax.scan(again, None, inputs)[1], 0, 1)
      out.append(mixed.reshape(mixed.shape[0], count * rows, *mixed.shape[3:]))
    if middle < end:
      out.append(plain(middle, end))
  return jnp.concatenate(out, 1)


class Attention(nnx.Module):
  """Multi-head causal self-attention; activations enter and leave with batch and sequence flattened to one axis."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    heads, kv_heads = ('heads', config.heads), ('kv_heads', config.key_heads)
    self.q = Linear((config.width, queries), ('embed', heads), 0.02, config, rngs, stack)
    self.k = Linear((config.width, keys), ('embed', kv_heads), 0.02, config, rngs, stack)
    self.v = Linear((config.width, keys), ('embed', kv_heads), 0.02, config, rngs, stack)
    # GPT-2 scales what is added to the residual stream by its number of additions, two a layer.
    self.out = Linear((queries, config.width), (heads, 'embed'), 0.02 / math.sqrt(2 * config.layers), config, rngs, stack)
    self.q_norm = Norm(config.head_width, 'head_width', config, rngs, stack) if config.qk_norm else None
    self.k_norm = Norm(config.head_width, 'head_width', config, rngs, stack) if config.qk_norm else None
    self.config = config

  def __call__(self, x: Float[Array, 'N D'], place: Place, cache: Cache | None, key: PRNGKeyArray | None,
               rows: Axis) -> tuple[Float[Array, 'N D'], Cache | None]:
    config, (b, t) = self.config, place.positions.shape
    heads = lambda y, axis: jax.lax.reshape(y, (b, t, y.shape[1] // config.head_width, config.head_width),
                                            out_sharding=spec('batch', None, axis, None))
    q, k, v = (checkpoint_name(heads(project(x), axis), name) for name, project, axis in (
      ('q', self.q, ('heads', config.heads)), ('k', self.k, ('kv_heads', config.key_heads)),
      ('v', self.v, ('kv_heads', config.key_heads))))
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    if config.positions == 'rope':
      q, k = (rotate(y, place.positions, config.rope_theta) for y in (q, k))
    if cache is None:
      keys, values = _for_heads(q, k, v)
      y = attention(config, q, keys, values, place.segments, key)
    else:
      assert place.filled is not None, 'a cache needs place.filled'
      start = (0, place.filled, 0, 0)
      cache = Cache(jax.lax.dynamic_update_slice(cache.keys, k, start), jax.lax.dynamic_update_slice(cache.values, v, start))
      mask = (place.filled + jnp.arange(t))[:, None] >= jnp.arange(cache.keys.shape[1])
      keys, values = _for_heads(q, *cache)
      y = attend(q, keys, values, mask[None], 0.0, None)
    y = checkpoint_name(jax.lax.reshape(y, (b * t, y.shape[2] * y.shape[3]), out_sharding=spec('batch', ('heads', config.heads))),
                        'attention')
    return self.out(y, rows), cache


def attention(config: ModelConfig, q: Float[Array, 'B T H C'], k: Float[Array, 'B T K C'], v: Float[Array, 'B T K C'],
              segments: Int[Array, 'B T'] | None, key: PRNGKeyArray | None) -> Float[Array, 'B T H C']:
  """Causal attention by the implementation that the config and the device choose."""
  # One that is named was checked before, for the device that the program is for, which need not be here.
  backend = attention_backend(config, q.shape[1]) if config.attention == 'auto' else config.attention
  if backend in KERNELS:
    return KERNELS[backend](q, k, v, segments)
  return causal_attention(q, k, v, segments, config.dropout, key, BLOCK if backend == 'blocks' else q.shape[1])


def _for_heads(q, *keys_and_values):
  """Keys and values that `model` does not share out, repeated to as many heads as there are queries, which it does."""
  place = jax.typeof(q).sharding.spec
  return tuple(x if jax.typeof(x).sharding.spec == place else jnp.repeat(x, q.shape[2] // x.shape[2], 2, out_sharding=place)
               for x in keys_and_values)
