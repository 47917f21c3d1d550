"""Causal attention where the tokens of a row are divided over devices: `ring` and `all_gather`, one blockwise computation.

Each device has the queries of its tokens. It attends to the keys of one device after the other and joins the results by their running
maximum and sum (arXiv:2112.05682); keys and values travel around a ring (arXiv:2310.01889) or are gathered first. The backward pass
exchanges them again, with their gradients, so that a device keeps no more than its own part. Pairs of blocks in which no query sees a key
are skipped: with the order of `gptjax/sharding/context.py`, every device computes half of the square of its queries and each chunk of keys.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from gptjax.model.kernels import ScoreConfig
from gptjax.model.layers import capped, drop, keep_weights, weight_keys
from gptjax.sharding import EXCHANGES, tensor_shard_map, token_places

MAX_BLOCK = 512
"""Maximum number of queries, and of keys, whose scores are computed at a time."""


class _Static(NamedTuple):
  """The static arguments of a compiled attention."""

  score: ScoreConfig
  exchange: str
  rate: float
  """of dropout"""


class _Chunk(NamedTuple):
  """What a device shows to all others."""

  keys: Float[Array, 'B K T C']
  values: Float[Array, 'B K T C']
  segments: Int[Array, 'B T'] | None


class _Softmax(NamedTuple):
  """A softmax over the keys so far, before the division by its sum."""

  maximum: Float[Array, 'B K G T']
  total: Float[Array, 'B K G T']
  output: Float[Array, 'B K G T C']


class _Pair(NamedTuple):
  """A block of t queries and one of s keys."""

  query: Int[Array, '']
  """the first of the queries, of all on this device"""
  key: Int[Array, '']
  queries: Float[Array, 'B K G t C']
  """times the scale of the scores"""
  keys: Float[Array, 'B K s C']
  values: Float[Array, 'B K s C']
  scores: Float[Array, 'B K s G t']
  """-1e30 where the query does not see the key"""
  kept: Bool[Array, 'B K s G t'] | None


def context_attention(score: ScoreConfig, exchange: str, q: Float[Array, 'B K G T C'], k: Float[Array, 'B K T C'],
                      v: Float[Array, 'B K T C'], segments: Int[Array, 'B T'] | None, heads: Int[Array, 'K G'], rate: float,
                      dropout_keys: Key[Array, 'B'] | None) -> Float[Array, 'B K G T C']:
  """Attention of this device's T tokens to themselves and those before them in their row, segment and window, on whichever device.

  `exchange` is a name in EXCHANGES, `heads` the numbers of the query heads. Inside `batch_shard_map`, which has divided the tokens.
  """
  split, rows = jax.typeof(k).sharding.spec, PartitionSpec(None)
  queries, chunk = PartitionSpec(*split[:2]), _Chunk(split, split, rows)  # type: ignore[arg-type]  # specs in place of arrays
  local = functools.partial(_attention, _Static(score, exchange, rate))
  run = tensor_shard_map(local, (queries, chunk, queries), queries)
  return run(q, _Chunk(k, v, segments), weight_keys(rate, dropout_keys, heads, token_places(q.shape[3])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: _Static, q: Array, own: _Chunk, draws: Array | None) -> Array:
  return _forward(static, q, own, draws)[0]


def _forward(static, q, own, draws):
  def join(pair: _Pair, state: _Softmax) -> _Softmax:
    old = jax.tree.map(lambda x: _block(x, pair.query, pair.queries.shape[3], 3), state)
    maximum = jnp.maximum(old.maximum, pair.scores.max(2))
    weights, rescale = jnp.exp(pair.scores - maximum[:, :, None]), jnp.exp(old.maximum - maximum)
    total = old.total * rescale + weights.sum(2)
    weights = drop(weights.astype(own.values.dtype), pair.kept, static.rate)
    output = jnp.einsum('bksgt,bksc->bkgtc', weights, pair.values, preferred_element_type=jnp.float32)
    new = _Softmax(maximum, total, old.output * rescale[..., None] + output)
    return jax.tree.map(lambda x, block: jax.lax.dynamic_update_slice_in_dim(x, block, pair.query, 3), state, new)

  def step(state, chunk, device):
    return _over_pairs(static, q, own.segments, draws, chunk, device, join, state), None

  start = _Softmax(jnp.full(q.shape[:4], -1e30), jnp.zeros(q.shape[:4]), jnp.zeros(q.shape))
  (maximum, total, output), _ = EXCHANGES[static.exchange](step, start, own)
  output = (output / total[..., None]).astype(q.dtype)
  return output, (q, own, draws, output, maximum + jnp.log(total))


def _backward(static, saved, gradient):
  q, own, draws, output, normalizer = saved
  # As in plain attention: the sum over keys of weight times its gradient is that over features of output times its gradient.
  inner, gradient = (gradient.astype(jnp.float32) * output).sum(-1), gradient.astype(own.values.dtype)
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

  def add(pair: _Pair, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    dq, dk, dv = sums
    rows = lambda x: _block(x, pair.query, pair.queries.shape[3], 3)
    weights, dy = jnp.exp(pair.scores - rows(normalizer)[:, :, None]), rows(gradient)
    ds = weights * (drop(product('bksc,bkgtc->bksgt', pair.values, dy), pair.kept, static.rate) - rows(inner)[:, :, None])
    if cap := static.score.cap:  # tanh' = 1 - tanh^2; where the score is masked, its weight is 0
      ds = ds * (1 - jnp.square(jnp.maximum(pair.scores / cap, -1)))
    ds, dropped = ds.astype(q.dtype), drop(weights.astype(own.values.dtype), pair.kept, static.rate)
    return (_add_block(dq, product('bksgt,bksc->bkgtc', ds, pair.keys), pair.query, 3),
            _add_block(dk, product('bksgt,bkgtc->bksc', ds, pair.queries), pair.key, 2),
            _add_block(dv, product('bksgt,bkgtc->bksc', dropped, dy), pair.key, 2))

  def step(dq, chunk, device):
    zeros = jnp.zeros(own.keys.shape)
    dq, dk, dv = _over_pairs(static, q, own.segments, draws, chunk, device, add, (dq, zeros, zeros))
    return dq, (dk, dv)

  dq, (dk, dv) = EXCHANGES[static.exchange](step, jnp.zeros(q.shape), own)
  return (dq * static.score.scale).astype(q.dtype), _Chunk(dk.astype(q.dtype), dv.astype(q.dtype), None), None


_attention.defvjp(_forward, _backward)


def _over_pairs(static: _Static, q: Array, segments: Array | None, draws: Array | None, chunk: _Chunk, device: Array,
                visit: Callable[[_Pair, Any], Any], state: Any) -> Any:
  """state = visit(pair, state) for each pair of a block of q and one of a device's chunk of keys in which a query may see a key."""
  score, count = static.score, q.shape[3]
  size = next(size for size in range(min(MAX_BLOCK, count // 2), 0, -1) if count // 2 % size == 0)  # no block lies in both parts
  places, sources = token_places(count), token_places(count, device)
  starts = sources[::size]

  def pair(query, key) -> _Pair:
    queries, keys = _block(q, query, size, 3) * score.scale, _block(chunk.keys, key, size, 2)
    here, there = _block(places, query, size, 0), _block(sources, key, size, 0)
    distance = here - there[:, None]
    seen = ((distance >= 0) & (distance < score.window) if score.window else distance >= 0)[None]
    if segments is not None and chunk.segments is not None:
      seen = seen & (_block(chunk.segments, key, size, 1)[:, :, None] == _block(segments, query, size, 1)[:, None])
    scores = capped(jnp.einsum('bksc,bkgtc->bksgt', keys, queries, preferred_element_type=jnp.float32), score.cap)
    scores = jnp.where(seen[:, None, :, None], scores, -1e30)
    kept = keep_weights(static.rate, None if draws is None else _block(draws, query, size, 3), there)
    return _Pair(query, key, queries, keys, _block(chunk.values, key, size, 2), scores, kept)

  def block(number, state):
    first = places[number * size]
    end = jnp.sum(starts < first + size)  # of the blocks in the order of their places, which is also that on the device
    begin = jnp.sum(starts + size <= first - score.window + 1) if score.window else 0
    return jax.lax.fori_loop(begin, end, lambda at, state: visit(pair(number * size, at * size), state), state)

  return jax.lax.fori_loop(0, count // size, block, state)


def _block(x: Array, start: Array, size: int, axis: int) -> Array:
  return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _add_block(x: Array, block: Array, start: Array, axis: int) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(x, _block(x, start, block.shape[axis], axis) + block, start, axis)
