"""Causal self-attention: grouped queries, rotary positions, a cache for decoding."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.config import ComputeConfig, ModelConfig, RopeConfig
from gptjax.model.context_attention import context_attention
from gptjax.model.kernels import KERNELS, ScoreConfig, attention_backend
from gptjax.model.layers import Linear, Norm, capped, drop, keep_weights, matrix_std, weight_keys
from gptjax.model.weights import Stack, TokenAxis
from gptjax.sharding import context_size, divisible, spec, token_places

BLOCK = 64
"""Query rows per block: at 64 the skipped half of the square outweighs the smaller products on a CPU."""

PARTS = 8
"""Parts of a row whose keys end at their own end: with 8, 9/16 of the square is computed where 1/2 is needed."""


class Cache(NamedTuple):
  """Keys and values of the last tokens, for one layer: those of token i at i modulo S. The products of each head read contiguous memory."""

  keys: Float[Array, 'B K S C']
  values: Float[Array, 'B K S C']


Caches = tuple[Cache, ...]
"""One for each layer; those of layers with a window are shorter."""


class Positions(NamedTuple):
  """Positions of the tokens of a batch, and what each of them may attend to."""

  values: Int[Array, 'B T']
  """position of each token in its document"""
  segments: Int[Array, 'B T'] | None = None
  """document of each token; None: a row is one document"""
  cached: Int[Array, ''] | Int[Array, 'B'] | None = None
  """tokens in the cache, padding included: of all rows, or of each row; None: there is no cache, or it is empty"""
  padding: Int[Array, 'B'] | None = None
  """tokens of padding at the start of each cached row"""
  mask: Float[Array, 'B T'] | None = None
  """weight of each token in the statistics of layers; None: 1"""

  @property
  def counted(self) -> Float[Array, 'B T']:
    """The mask, complete."""
    return jnp.ones(self.values.shape) if self.mask is None else self.mask


def positions_of(batch: dict[str, Array]) -> Positions:
  """The positions of a batch's tokens; without any in the batch each row is one document."""
  shape = batch['tokens'].shape
  values = batch['positions'] if 'positions' in batch else jnp.broadcast_to(token_places(shape[1]), shape)
  return Positions(values, batch.get('segments'), mask=batch.get('mask'))


def left_padded(length: int, padding: Int[Array, 'B']) -> Positions:
  """Positions of rows of `length` tokens, of which the first `padding` ones are padding, which nothing attends to."""
  index = jnp.arange(length) - padding[:, None]
  return Positions(jnp.maximum(index, 0), (index >= 0).astype(jnp.int32))


def frequencies(rope: RopeConfig, half: int, local: bool) -> np.ndarray:
  """Radians per position of each pair of features, in a layer with a window (`local`) or without: theta^(-i/half), then scaled."""
  theta = rope.local_theta if local and rope.local_theta else rope.theta
  turn = theta ** (-np.arange(half) / half)
  if rope.scaling == 'none' or (local and rope.local_theta):
    return turn.astype(np.float32)
  if rope.scaling == 'linear':
    return (turn / rope.factor).astype(np.float32)
  # From 0 where a wavelength fits fewer than `low` times into the original context to 1 where it fits more than `high` times.
  kept = np.clip((rope.original_context * turn / (2 * math.pi) - rope.low) / (rope.high - rope.low), 0, 1)
  return (turn * (kept + (1 - kept) / rope.factor)).astype(np.float32)


def rotate(x: Float[Array, 'B H T C'], positions: Int[Array, 'B T'], frequency: Float[np.ndarray, 'half']) -> Float[Array, 'B H T C']:
  """Rotary position embedding (arXiv:2104.09864, equation 34): halves of each head turned by position * frequency."""
  half = x.shape[-1] // 2
  angle = positions[:, None, :, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attend(score: ScoreConfig, q: Float[Array, 'B K G T C'], k: Float[Array, 'B K S C'], v: Float[Array, 'B K S V'],
           mask: Bool[Array, '#B T S'], kept: Bool[Array, 'B K S G T'] | None = None, rate: float = 0.0) -> Float[Array, 'B K G T V']:
  """softmax(scale q k) v, in float32, over keys in `mask` (arXiv:1706.03762, equation 1), with G queries per key (arXiv:2305.13245);
  of dropout at a `rate`, the weights that are `kept`."""
  # Keys come before queries, because then most products of the two passes read their operands as they lie in memory.
  scores = capped(jnp.einsum('bksc,bkgtc->bksgt', k, q * score.scale, preferred_element_type=jnp.float32), score.cap)
  return _softmax_average(scores, v, jnp.swapaxes(mask, 1, 2)[:, None, :, None], kept, rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _softmax_average(scores: Float[Array, 'B K S G T'], v: Float[Array, 'B K S C'], mask: Bool[Array, '#B 1 S 1 T'],
                     kept: Bool[Array, 'B K S G T'] | None, rate: float) -> Float[Array, 'B K G T C']:
  """softmax(scores) v over the keys in `mask`; weights that are not `kept` are dropped. Each query needs at least one key in its mask.

  Two identities avoid passes over arrays as large as the scores. Products with v are divided by the sum of the weights, instead of the
  weights themselves. In the backward pass, the sum over keys of weight times its gradient equals the sum over features of output times
  its gradient (arXiv:2205.14135, appendix B.2).
  """
  return _softmax_average_forward(scores, v, mask, kept, rate)[0]


def _softmax_average_forward(scores, v, mask, kept, rate):
  scores = jnp.where(mask, scores, -1e30)
  weights = jnp.exp(scores - scores.max(2, keepdims=True))
  inverse = 1 / weights.sum(2)[..., None]
  weights = weights.astype(v.dtype)
  output = jnp.einsum('bksgt,bksc->bkgtc', drop(weights, kept, rate), v, preferred_element_type=jnp.float32)
  output = (output * inverse).astype(v.dtype)
  return output, (weights, inverse, v, kept, output)


def _softmax_average_backward(rate, saved, gradient):
  weights, inverse, v, kept, output = saved
  gradient = gradient * inverse
  total = (gradient * output).sum(-1)[:, :, None]
  gradient = gradient.astype(v.dtype)
  weight_gradient = drop(jnp.einsum('bksc,bkgtc->bksgt', v, gradient, preferred_element_type=jnp.float32), kept, rate)
  value_gradient = jnp.einsum('bksgt,bkgtc->bksc', drop(weights, kept, rate), gradient)
  return weights * (weight_gradient - total), value_gradient, None, None


_softmax_average.defvjp(_softmax_average_forward, _softmax_average_backward)


def causal_attention(score: ScoreConfig, q: Float[Array, 'B H T C'], k: Float[Array, 'B K T C'], v: Float[Array, 'B K T V'],
                     segments: Int[Array, 'B T'] | None, rate: float, dropout_keys: Key[Array, 'B'] | None,
                     rows: int) -> Float[Array, 'B H T V']:
  """Attention of each token to itself and those before it in its segment and window, `rows` query rows at a time.

  A block of rows reads only the keys up to its own end, or in rows of more than PARTS blocks up to the end of its part: nearly half of the
  square is never computed. With a short window it reads only the keys that its rows attend to. The blocks of a part run one after the
  other and are computed again in the backward pass, so that memory grows with the context and not with its square.
  """
  length = q.shape[2]
  step = -(-length // (rows * PARTS)) * rows
  sliding = 0 < score.window <= step  # one part, then, with keys that move along
  step = length if sliding else step
  draws, q = weight_keys(rate, dropout_keys, _head_numbers(q, k), jnp.arange(length)), _grouped(q, k)

  def block(start, low, end, q, own_segments, draws):
    """Rows from `start` on against the keys from `low` (if it is traced: as many as they see) to `end`."""
    seen = (lambda x, axis: jax.lax.slice_in_dim(x, low, end, axis=axis)) if isinstance(low, int) else (
      lambda x, axis: jax.lax.dynamic_slice_in_dim(x, low, rows + score.window - 1, axis))
    keys, values = seen(k, 2), seen(v, 2)
    distance = (start + jnp.arange(q.shape[3]))[:, None] - (low + jnp.arange(keys.shape[2]))
    mask = (distance >= 0)[None]
    if score.window:
      mask = mask & (distance < score.window)
    if segments is not None:
      mask = mask & (own_segments[:, :, None] == seen(segments, 1)[:, None])
    kept = keep_weights(rate, draws, low + jnp.arange(keys.shape[2]))
    return attend(score, q, keys, values, mask, kept, rate)

  def lowest(start):
    return max(0, start - score.window + 1) if score.window else 0

  out = []
  for start in range(0, length, step):
    end = min(start + step, length)
    count = (end - start) // rows
    middle = start
    if count > 1:
      middle = start + count * rows

      def cut(x, axis):
        """The blocks of rows of x along an axis, as the elements of a leading one; None stays None."""
        if x is None:
          return None
        x = jax.lax.slice_in_dim(x, start, middle, axis=axis)
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, rows, *x.shape[axis + 1:]), axis, 0)

      starts = start + rows * jnp.arange(count)
      inputs = (starts, cut(q, 3), cut(segments, 1), cut(draws, 3))
      span = rows + score.window - 1
      low = (lambda at: jnp.clip(at + rows - span, 0, length - span)) if sliding and span < length else lambda at: lowest(start)
      again = jax.checkpoint(lambda _, part: (None, block(part[0], low(part[0]), end, *part[1:])), prevent_cse=False)
      mixed = jnp.moveaxis(jax.lax.scan(again, None, inputs)[1], 0, 3)
      out.append(mixed.reshape(*mixed.shape[:3], count * rows, mixed.shape[5]))
    if middle < end:
      last = (q[:, :, :, middle:end], segments if segments is None else segments[:, middle:end],
              draws if draws is None else draws[:, :, :, middle:end])
      out.append(block(middle, lowest(middle), end, *last))
  return _ungrouped(jnp.concatenate(out, 3))


def _grouped(q: Float[Array, 'B H T C'], keys: Float[Array, 'B K S C']) -> Float[Array, 'B K G T C']:
  """Queries by the head of the keys that they attend to."""
  (b, h, t, c), kv_heads = q.shape, keys.shape[1]
  return jax.lax.reshape(q, (b, kv_heads, h // kv_heads, t, c), out_sharding=spec(None, ('heads', h), None, None, None))


def _head_numbers(q: Float[Array, 'B H T C'], keys: Float[Array, 'B K S C']) -> Int[Array, 'K G']:
  """Numbers of the query heads, grouped as `_grouped` does."""
  heads, kv_heads = q.shape[1], keys.shape[1]
  numbers = jax.lax.broadcasted_iota(jnp.int32, (heads,), 0, out_sharding=spec(('heads', heads)))
  return jax.lax.reshape(numbers, (kv_heads, heads // kv_heads), out_sharding=spec(('heads', heads), None))


def _ungrouped(x: Float[Array, 'B K G T C']) -> Float[Array, 'B H T C']:
  b, k, g, t, c = x.shape
  return jax.lax.reshape(x, (b, k * g, t, c), out_sharding=spec(None, ('heads', k * g), None, None))


def attention_weights(score: ScoreConfig, q: Float[Array, 'B H T C'], k: Float[Array, 'B K T C'],
                      segments: Int[Array, 'B T'] | None) -> Float[Array, 'B H T T']:
  """The weight of every key for each query: what attention makes of values that are unit vectors."""
  length = q.shape[2]
  unit = jnp.zeros((*k.shape[:2], length, length), out_sharding=jax.typeof(k).sharding.spec) + jnp.eye(length)
  return causal_attention(score, q, k, unit, segments, 0.0, None, length)


class Attention(nnx.Module):
  """Multi-head causal self-attention; activations enter and leave with batch and sequence flattened to one axis.

  `watch`, if it is set, gets the `attention_weights` of each call without a cache; without it nothing computes them.
  """

  watch: Callable[[Array], object] | None = None

  def __init__(self, config: ModelConfig, compute: ComputeConfig, stack: Stack = ()):
    queries, keys = config.heads * config.head_width, config.key_heads * config.head_width
    heads, kv_heads, bias = ('heads', config.heads), ('kv_heads', config.key_heads), config.bias or config.qkv_bias
    std = matrix_std(config)
    self.q = Linear((config.width, queries), ('embed', heads), std, compute, stack, bias, 'x')
    self.k = Linear((config.width, keys), ('embed', kv_heads), std, compute, stack, bias, 'x')
    self.v = Linear((config.width, keys), ('embed', kv_heads), std, compute, stack, bias, 'x')
    self.out = Linear((queries, config.width), (heads, 'embed'), matrix_std(config, residual=True), compute, stack, config.bias)
    def norm(size, axis):
      if config.qk_norm == 'none':
        return None
      return Norm(*((config.head_width, 'head_width') if config.qk_norm == 'head' else (size, axis)), config, compute, stack)
    self.q_norm, self.k_norm = norm(queries, heads), norm(keys, kv_heads)
    self.config, self.compute = config, compute

  def __call__(self, x: Float[Array, 'N D'], layer: int | Int[Array, ''], positions: Positions, cache: Cache | None,
               keys: Key[Array, 'B'] | None, rows: TokenAxis) -> tuple[Float[Array, 'N D'], Cache | None]:
    config, (b, t) = self.config, positions.values.shape

    def project(name, linear, norm, count, axis):
      y = checkpoint_name(linear(x), name)
      y = norm(y) if norm is not None and config.qk_norm != 'head' else y
      y = jax.lax.reshape(y, (b, t, count, config.head_width), out_sharding=spec(None, None, (axis, count), None))
      return jnp.swapaxes(norm(y) if norm is not None and config.qk_norm == 'head' else y, 1, 2)

    q = project('q', self.q, self.q_norm, config.heads, 'heads')
    k = project('k', self.k, self.k_norm, config.key_heads, 'kv_heads')
    v = project('v', self.v, None, config.key_heads, 'kv_heads')

    def mix(sees_all, q, k, v):
      if config.positions == 'rope':
        frequency = frequencies(config.rope, config.head_width // 2, not sees_all)
        q, k = rotate(q, positions.values, frequency), rotate(k, positions.values, frequency)
      scale = (config.query_pre_attn_scalar or config.head_width) ** -0.5
      score = ScoreConfig(scale, config.attention_cap, 0 if sees_all else config.window)
      k, v = _for_queries(k), _for_queries(v)
      if positions.cached is None:
        if self.watch is not None:
          self.watch(attention_weights(score, q, k, positions.segments))
        y = attention(config, self.compute, score, q, k, v, positions.segments, keys)
        return y, None if cache is None else Cache(_prefilled(cache.keys, k), _prefilled(cache.values, v))
      return (_extend if positions.cached.ndim else _decode)(score, q, k, v, positions, cache)

    if config.global_every and not isinstance(layer, int):
      y, cache = jax.lax.cond((layer + 1) % config.global_every == 0, functools.partial(mix, True), functools.partial(mix, False), q, k, v)
    else:
      y, cache = mix(config.sees_all(layer if isinstance(layer, int) else 0), q, k, v)
    y = jax.lax.reshape(jnp.swapaxes(y, 1, 2), (b * t, config.heads * config.head_width), out_sharding=spec(None, ('heads', config.heads)))
    return self.out(checkpoint_name(y, 'attention'), rows), cache


def attention(config: ModelConfig, compute: ComputeConfig, score: ScoreConfig, q: Float[Array, 'B H T C'], k: Float[Array, 'B K T C'],
              v: Float[Array, 'B K T C'], segments: Int[Array, 'B T'] | None, keys: Key[Array, 'B'] | None) -> Float[Array, 'B H T C']:
  """Causal attention by the implementation that the config and the device choose; over all devices that share rows, if several do."""
  if context_size() > 1:
    return _ungrouped(context_attention(score, compute.context_attention, _grouped(q, k), k, v, segments, _head_numbers(q, k),
                                        config.dropout, keys))
  # One that is named was checked before, for the device that the program is for, which may be another than this process's.
  backend = attention_backend(config, compute, q.shape[2]) if compute.attention == 'auto' else compute.attention
  if backend in KERNELS:
    return KERNELS[backend](score, q, k, v, segments)
  return causal_attention(score, q, k, v, segments, config.dropout, keys, BLOCK if backend == 'blocks' else q.shape[2])


def _prefilled(cache: Float[Array, 'B K S C'], x: Float[Array, 'B K T C']) -> Float[Array, 'B K S C']:
  """A fresh cache with the last tokens that it can keep."""
  size, length = cache.shape[2], x.shape[2]
  if length <= size:
    return jax.lax.dynamic_update_slice(cache, x, (0, 0, 0, 0))
  return jnp.roll(x[:, :, length - size:], length % size, 2)


def _decode(score: ScoreConfig, q: Float[Array, 'B H 1 C'], k: Float[Array, 'B K 1 C'], v: Float[Array, 'B K 1 C'],
            positions: Positions, cache: Cache) -> tuple[Float[Array, 'B H 1 C'], Cache]:
  """Attention of one more token per row, which replaces the oldest one in a full cache."""
  cached, size = positions.cached, cache.keys.shape[2]
  assert cached is not None

  def write(cache):
    return Cache(*(jax.lax.dynamic_update_slice(old, new, (0, 0, cached % size, 0)) for old, new in zip(cache, (k, v))))

  # Of a single row or key head XLA for CPUs would make two updated caches, for the products and for the next step, both of them copies. It
  # does not look into a condition, though this one always holds.
  cache = jax.lax.platform_dependent(
    cache, cpu=lambda cache: jax.lax.cond(cached >= 0, write, lambda cache: cache, cache), default=write)
  token = cached - (cached - jnp.arange(size)) % size  # the token in each place; below 0: none yet
  padding = jnp.zeros(q.shape[0], jnp.int32) if positions.padding is None else positions.padding
  return _ungrouped(attend(score, _grouped(q, cache.keys), *cache, (token >= padding[:, None])[:, None])), cache


def _extend(score: ScoreConfig, q: Float[Array, 'B H T C'], k: Float[Array, 'B K T C'], v: Float[Array, 'B K T C'],
            positions: Positions, cache: Cache) -> tuple[Float[Array, 'B H T C'], Cache]:
  """Attention of T more tokens per row to themselves and those before them, where every row has as many as it has.

  The cache must keep all tokens of a row, each in the place of its position; tokens whose place it does not have are dropped.
  """
  place, position = jnp.arange(cache.keys.shape[2]), positions.values
  write = lambda old, new: jax.vmap(lambda old, new, at: old.at[:, at].set(new, mode='drop'))(old, new, position)
  cache = Cache(write(cache.keys, k), write(cache.values, v))
  distance = position[:, :, None] - place
  mask = distance >= 0
  if score.window:
    mask = mask & (distance < score.window)
  return _ungrouped(attend(score, _grouped(q, cache.keys), *cache, mask)), cache


def _for_queries(x: Float[Array, 'B K T C']) -> Float[Array, 'B L T C']:
  """Keys or values with each head repeated until `model` divides their number, so that each device holds those that its queries read."""
  heads = divisible('kv_heads', x.shape[1])
  return jnp.repeat(x, heads // x.shape[1], 1, out_sharding=spec(None, ('kv_heads', heads), None, None))
