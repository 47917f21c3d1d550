"""Parameters inside the model: how each is read by a product, and how its gradient leaves it.

A weight may be shared out over `data` (ZeRO stage 3). Then it is gathered, in the type that computes, where it is read, and once
more in the backward pass; nothing keeps the whole of it. Its gradient is summed in float32 by the product that makes it, straight
into the place where it shall lie, so that it is reduced and scattered in one go.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptjax.sharding import RULES, Axis, spec

Stack = tuple[int, ...]
"""Leading axes of a module's parameters: () for one layer, (L,) for L layers that a scan runs through."""


class Copy(NamedTuple):
  """A weight whose gradient lies elsewhere than the weight itself: stages 1 and 2 of ZeRO."""

  value: Array
  """what products read; no gradient flows to it"""
  gradient: Array
  """zeros that are never read: the gradient is taken with respect to them, and so has their type and their place"""


Weight = Array | Copy


def parameter(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: tuple[Axis, ...], stack: Stack,
              dtype: str = 'float32') -> nnx.Param:
  """A float32 parameter that carries its logical axes and the type it is read in; a stacked one gains the axis 'layers'."""
  value = init(rngs.params(), stack + shape, jnp.float32)
  return nnx.Param(value, axes=('layers',) * len(stack) + axes, dtype=dtype)


def axes_of(param: nnx.Param) -> tuple[Axis, ...]:
  """Logical axes of one layer's parameter: inside a scan over layers the leading axis is gone."""
  return tuple(axis for axis in param.get_metadata('axes') if axis != 'layers')


def whole(param: nnx.Param) -> Array:
  """A small parameter as the model computes with it: gathered over `data` where ZeRO keeps it shared out."""
  return _read(param.get_value(), param.get_metadata('dtype'), spec(*axes_of(param)))


def product(x: Float[Array, 'N I'], param: nnx.Param, rows: Axis, transposed: bool = False, again: bool = False) -> Float[Array, 'N O']:
  """x W, or x W^T, with N over the devices of `rows`.

  Args:
    x: activations; where their rows lie over `model` too, they are gathered over it, here and in the backward pass.
    param: W [I, O], or [O, I] if transposed here or in the parameter's metadata.
    rows: logical axis of the result's rows, 'batch' or 'tokens'. Where the sum over I ends the split over `model`, 'tokens' scatters it.
    transposed: multiply by W^T.
    again: whether the compiler must be kept from holding the gathered W until the backward pass. Scans and recomputed blocks keep nothing.
  """
  places, transposed = spec(*axes_of(param)), transposed or param.get_metadata('transposed', False)
  out = PartitionSpec(*spec(rows), places[0 if transposed else 1])
  return _product(x, param.get_value(), param.get_metadata('dtype'), places, out, transposed, again)


def lookup(param: nnx.Param, ids: Int[Array, 'N'], rows: Axis) -> Float[Array, 'N D']:
  """Rows of a table [V, D] by id, the result's rows over the devices of `rows`.

  Where the table is split over `model`, each device finds the ids that it has, and the rest is zero before the sum.
  """
  return _lookup(param.get_value(), ids, param.get_metadata('dtype'), spec(*axes_of(param)), spec(rows)[0])


def read(weight: Weight, dtype: str, place: PartitionSpec) -> Array:
  """The whole weight in the type that computes."""
  return jax.reshard(_value(weight).astype(dtype), place)


by_hand = functools.partial(jax.shard_map, check_vma=False)
"""shard_map for what sums over the mesh itself. Its check must be off: types drop mesh axes of one device, names in a sum do not."""


def summed(x: Array, place: PartitionSpec, over: tuple[str, ...]) -> Array:
  """Inside a shard_map: the sum of x over mesh axes, each device keeping what `place` gives it of it.

  The last axis, the fastest network, comes first: what it has scattered crosses the slower ones in parts.
  """
  for axis in reversed(over):
    split = [i for i, names in enumerate(place) if axis in (names if isinstance(names, tuple) else (names,))]
    x = jax.lax.psum_scatter(x, axis, scatter_dimension=split[0], tiled=True) if split else jax.lax.psum(x, axis)
  return x


def home(weight: Weight) -> PartitionSpec:
  """Where the weight's gradient lies."""
  return jax.typeof(weight.gradient if isinstance(weight, Copy) else weight).sharding.spec


def given_back(weight: Weight, gradient: Array) -> Weight:
  """The cotangent of a weight."""
  if not isinstance(weight, Copy):
    return gradient
  value = jax.typeof(weight.value)  # nobody asks for its gradient: the compiler drops it
  return Copy(jnp.zeros(value.shape, value.dtype, out_sharding=value.sharding.spec), gradient)


def _value(weight: Weight) -> Array:
  return weight.value if isinstance(weight, Copy) else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _read(weight, dtype, place):
  return read(weight, dtype, place)


def _read_backward(dtype, place, weight, gradient):
  return given_back(weight, jax.reshard(gradient.astype(jnp.float32), home(weight))),


_read.defvjp(lambda weight, dtype, place: (_read(weight, dtype, place), weight), _read_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _product(x, weight, dtype, place, out, transposed, again):
  w = read(weight, dtype, place)
  if transposed:  # in this order XLA reads W as it lies, however few rows x has
    return jnp.matmul(w, _gathered(x).T, out_sharding=PartitionSpec(*out[::-1])).T
  return jnp.matmul(_gathered(x), w, out_sharding=out)


def _product_forward(x, weight, *static):
  return _product(x, weight, *static), (x, weight)


def _product_backward(dtype, place, out, transposed, again, saved, dy):
  x, weight = saved
  value = jax.lax.optimization_barrier(_value(weight)) if again else _value(weight)
  w = read(value, dtype, place)
  full, dy = _gathered(x), _gathered(dy)
  dx = jnp.matmul(dy, w if transposed else w.T, out_sharding=jax.typeof(x).sharding.spec)
  a, b = (dy, full) if transposed else (full, dy)
  # Said in two steps, or the compiler may exchange activations instead, where they are smaller.
  part = PartitionSpec(*place, unreduced=set(RULES['batch']))
  dw = jnp.einsum('na,nb->ab', a, b, preferred_element_type=jnp.float32, out_sharding=part)
  return dx, given_back(weight, jax.reshard(dw, home(weight)))


_product.defvjp(_product_forward, _product_backward)


def _gathered(x: Float[Array, 'N D']) -> Float[Array, 'N D']:
  """Activations with the rows that `model` shares out, if it does, together again."""
  return jax.reshard(x, PartitionSpec(RULES['batch'], jax.typeof(x).sharding.spec[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _lookup(table, ids, dtype, place, rows):
  split = place[0]  # the mesh axis that shares out the ids, if one does
  def local(table, ids):
    if split is None:
      return table[ids]
    found, mine = _mine(ids, table.shape[0], split)
    return summed(jnp.where(mine[:, None], table[found], 0), PartitionSpec(split if split in rows else None), (split,))
  batch = rows if split is None else RULES['batch']
  return by_hand(local, in_specs=(place, PartitionSpec(batch)), out_specs=PartitionSpec(rows, None))(
    read(table, dtype, place), jax.reshard(ids, PartitionSpec(batch)))


def _lookup_backward(dtype, place, rows, saved, dy):
  table, ids = saved
  split, size = place[0], _value(table).shape[0]
  batch = rows if split is None else RULES['batch']
  def local(ids, dy):
    here = size
    if split is not None:
      here = size // jax.lax.axis_size(split)
      found, mine = _mine(ids, here, split)
      ids = jnp.where(mine, found, here)  # beyond the last row: dropped
    sums = jnp.zeros((here, dy.shape[1]), jnp.float32).at[ids].add(dy.astype(jnp.float32), mode='drop')
    return summed(sums, home(table), batch)
  gradient = by_hand(local, in_specs=(PartitionSpec(batch), PartitionSpec(batch, None)), out_specs=home(table))(
    jax.reshard(ids, PartitionSpec(batch)), jax.reshard(dy, PartitionSpec(batch, None)))
  return given_back(table, gradient), None


_lookup.defvjp(lambda table, ids, *static: (_lookup(table, ids, *static), (table, ids)), _lookup_backward)


def _mine(ids: Int[Array, 'N'], rows: int, axis: str) -> tuple[Int[Array, 'N'], Array]:
  """Places of ids in this device's part of a table, and which of them it has."""
  found = ids - jax.lax.axis_index(axis) * rows
  mine = (found >= 0) & (found < rows)
  return jnp.where(mine, found, 0), mine
