"""How tokens reach the devices that hold their experts, and results come back. No token is dropped: buffers have room for all."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.config import EXPERTS_AXIS
from gptjax.model.grouped import Sorted


@dataclasses.dataclass(frozen=True)
class Route:
  """The way of a device's tokens to experts and back; `collect` is the transpose of `send`."""

  rows: Sorted
  """rows of this device's experts, whose index is one of the tokens that `send` returns"""
  send: Callable[[Float[Array, 'N D']], Float[Array, 'M D']]
  """what experts on this device may read, from this device's tokens"""
  collect: Callable[[Float[Array, 'Q D']], Float[Array, 'N D']]
  """for each of this device's tokens the sum of its experts' rows, which are on any device"""
  collect_gains: Callable[[Float[Array, 'Q']], Float[Array, 'N K']]
  """for each of this device's tokens a number per expert"""


def exchanges(groups: int, experts_per_token: int) -> bool:
  """Whether a ragged all-to-all sends less than gathering all tokens on each of `groups` devices: (groups - 1) / groups rows for each
  expert of a token, instead of groups - 1 for each token."""
  return groups > experts_per_token


def route(ids: Int[Array, 'N K'], gains: Float[Array, 'N K'], experts: int, groups: int, exchange: Callable | None) -> Route:
  """The way to the experts `ids` of each token and back, where `groups` devices hold equal parts of the `experts`.

  Where there are several, this runs inside a shard_map that is manual over their axis. With `exchange`, which is
  `jax.lax.ragged_all_to_all`, each row goes to the device of its expert; without, every device gets all tokens.
  """
  return _exchanged(ids, gains, experts, groups, exchange) if exchange and groups > 1 else _gathered(ids, gains, experts, groups)


def _gathered(ids, gains, experts, groups):
  (own, k), count = ids.shape, experts // groups
  gather = lambda x: jax.lax.all_gather(x, EXPERTS_AXIS, tiled=True) if groups > 1 else x
  scatter = lambda x: jax.lax.psum_scatter(x, EXPERTS_AXIS, tiled=True) if groups > 1 else x
  ids, gains = gather(ids).reshape(-1), gather(gains).reshape(-1)
  expert = ids - (jax.lax.axis_index(EXPERTS_AXIS) * count if groups > 1 else 0)
  mine = (expert >= 0) & (expert < count)
  order, inverse, sizes = _sort(jnp.where(mine, expert, count), count)
  rows = Sorted(order // k, jnp.where(mine, gains, 0)[order], sizes)

  def collect(x):
    return scatter(_sum(x, inverse.reshape(own * groups, k)))

  return Route(rows, gather, collect, lambda x: scatter(x[inverse].reshape(own * groups, k)))


def _exchanged(ids, gains, experts, groups, exchange):
  (own, k), count, me = ids.shape, experts // groups, jax.lax.axis_index(EXPERTS_AXIS)
  order, inverse, sizes = _sort(ids.reshape(-1), experts)
  pairs = jax.lax.all_gather(sizes, EXPERTS_AXIS).reshape(groups, groups, count)  # rows by sender, receiver and expert
  sent = pairs.sum(2)
  before = lambda x, axis: jnp.cumsum(x, axis) - x
  # Where a sender's rows for a receiver begin, at the sender and at the receiver.
  leave, arrive = before(sent, 1), before(sent, 0)
  room = groups * own * k

  def there(x):
    return exchange(x, jnp.zeros((room, *x.shape[1:]), x.dtype), leave[me], sent[me], arrive[me], sent[:, me], axis_name=EXPERTS_AXIS)

  def back(x):
    return exchange(x, jnp.zeros((own * k, *x.shape[1:]), x.dtype), arrive[:, me], sent[:, me], leave[:, me], sent[me],
                    axis_name=EXPERTS_AXIS)

  # They arrive by sender, and by expert within each.
  mine = pairs[:, me]
  expert = jnp.repeat(jnp.tile(jnp.arange(count), groups), mine.reshape(-1), total_repeat_length=room)
  index, position, sizes = _sort(jnp.where(jnp.arange(room) < mine.sum(), expert, count), count)
  rows = Sorted(index, there(gains.reshape(-1, 1)[order])[index, 0], sizes)
  return Route(rows, lambda x: there(x[order // k]), lambda x: _sum(back(x[position]), inverse.reshape(own, k)),
               lambda x: back(x[position, None])[inverse, 0].reshape(own, k))


def _sum(x: Float[Array, 'Q D'], places: Int[Array, 'N K']) -> Float[Array, 'N D']:
  """For each token the sum of some rows, added up in float32 one after the other, so that no array holds all of them."""
  return functools.reduce(jnp.add, (x[places[:, one]].astype(jnp.float32) for one in range(places.shape[1]))).astype(x.dtype)


def _sort(expert: Int[Array, 'R'], count: int) -> tuple[Int[Array, 'R'], Int[Array, 'R'], Int[Array, 'G']]:
  """Rows in the order of their experts, the place of each row in this order, and the rows of each expert below `count`."""
  order = jnp.argsort(expert)
  inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
  return order, inverse, jnp.sum(expert[:, None] == jnp.arange(count), 0)
