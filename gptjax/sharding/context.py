"""Context parallelism: which tokens of a row each device has, and what the devices that share rows exchange.

A row is cut into 2n parts for n devices, of which device i has parts i and 2n-1-i: an early and a late one, so that all devices have the
same work in causal attention. The host puts the tokens in this order before they are placed on devices, which costs no traffic.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gptjax.config import LAYERS_AXIS, TOKENS_AXIS


def token_order(length: int, size: int) -> Int[np.ndarray, 'T']:
  """Places in the row of its tokens, in the order in which `size` devices divide them; 2 * size must divide `length` if size is above 1."""
  if size == 1:
    return np.arange(length)
  parts = np.arange(length).reshape(2 * size, -1)
  return np.stack([parts[:size], parts[::-1][:size]], 1).reshape(-1)


def context_size() -> int:
  """Number of devices that share each row: 1 outside of `batch_shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape[TOKENS_AXIS] if TOKENS_AXIS in mesh.manual_axes else 1


def token_places(count: int, device: int | Int[Array, ''] | None = None) -> Int[Array, 'T']:
  """Inside `batch_shard_map`: the places in their row of the `count` tokens of a device on the context axis (default: this one)."""
  if (size := context_size()) == 1:
    return jnp.arange(count)
  device, part = jax.lax.axis_index(TOKENS_AXIS) if device is None else device, count // 2
  return (jnp.stack([device, 2 * size - 1 - device])[:, None] * part + jnp.arange(part)).reshape(count)


Step = Callable[[Any, Any, Int[Array, '']], tuple[Any, Any]]
"""(state, a device's chunk, that device) -> (state, contribution to that device)"""


def _to_next(x: Array) -> Array:
  """The array of the device before this one on the context axis."""
  size, here = context_size(), jax.lax.axis_index(TOKENS_AXIS)
  permuted = lambda x: jax.lax.ppermute(x, TOKENS_AXIS, [(i, (i + 1) % size) for i in range(size)])
  if jax.lax.axis_size(LAYERS_AXIS) == 1:
    return permuted(x)
  # Pipeline stages run different operations at a time. XLA for CPUs waits for all of them in a permute, and mixes them up.
  gathered = lambda x: jax.lax.all_gather(x, TOKENS_AXIS)[(here - 1) % size]
  return jax.lax.platform_dependent(x, cpu=gathered, default=permuted)


def _around_ring(step: Step, state: Any, chunk: Any) -> tuple[Any, Any]:
  """Each chunk travels to the next device while the one before it is used, size - 1 times in all; contributions travel with it, and once
  more, home."""
  size, here = context_size(), jax.lax.axis_index(TOKENS_AXIS)
  to_next = functools.partial(jax.tree.map, _to_next)

  def visit(state, sums, chunk, distance):
    state, contribution = step(state, chunk, (here - distance) % size)
    return state, jax.tree.map(jnp.add, to_next(sums), contribution)

  def body(carry, distance):
    state, sums, chunk = carry
    following = to_next(chunk)
    return (*visit(state, sums, chunk, distance), following), None

  following = to_next(chunk)
  state, sums = step(state, chunk, here)
  (state, sums, last), _ = jax.lax.scan(body, (state, sums, following), jnp.arange(1, size - 1))
  state, sums = visit(state, sums, last, size - 1)
  return state, to_next(sums)


def _gathered(step: Step, state: Any, chunk: Any) -> tuple[Any, Any]:
  """All chunks are gathered first, and contributions are reduce-scattered afterwards."""
  chunks = jax.tree.map(lambda x: jax.lax.all_gather(x, TOKENS_AXIS), chunk)
  state, contributions = jax.lax.scan(lambda state, x: step(state, *x), state, (chunks, jnp.arange(context_size())))
  return state, jax.tree.map(lambda x: jax.lax.psum_scatter(x, TOKENS_AXIS), contributions)


EXCHANGES: dict[str, Callable[[Step, Any, Any], tuple[Any, Any]]] = {'ring': _around_ring, 'all_gather': _gathered}
"""By their name in compute.context_attention: functions (step, state, chunk) -> (state, sums) that apply a step to the chunks of all
devices on the context axis, and return to each device the sum of what the steps contribute to its chunk."""
