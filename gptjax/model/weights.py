"""Parameters inside the model: how they are created, and how matrix products read them.

Activations are those of one device's tokens; `model` may split matrices, and under sequence parallelism the tokens too. A product casts and
(at ZeRO stage 3) gathers a weight, again in the backward pass, so that nothing holds it in between. Its gradient is summed in float32.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptjax.config import TENSOR_AXIS
from gptjax.sharding import Axis, as_weight, spec, tensor_shard_map

Stack = tuple[int, ...]
"""Leading dimensions of a module's parameters: () for one layer, (L,) for L layers that a scan runs through."""

TokenAxis = str | None
"""Mesh axis over which the tokens of activations are split between matrix products: `model` under sequence parallelism; None: a device has
all tokens of its part of the batch."""


def parameter(init: Callable[..., jax.Array], shape: tuple[int, ...], axes: tuple[Axis, ...], stack: Stack, dtype: str = 'float32',
              input: str = '') -> nnx.Param:
  """A float32 parameter without values: its shape, initializer, logical axes (stacked: 'layers' too), the dtype in which it is read, and
  the name of the input that it is multiplied with, if others are too."""
  value = jax.ShapeDtypeStruct(stack + shape, jnp.float32)
  return nnx.Param(value, init=init, axes=('layers',) * len(stack) + axes, size=shape[0], dtype=dtype, input=input)


@dataclasses.dataclass(frozen=True)
class Random:
  """An initializer: random values times a factor."""

  draw: Callable[..., jax.Array]
  """(key, shape, dtype) -> values"""
  factor: float

  def __call__(self, key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    return self.draw(key, shape, dtype) * jnp.array(self.factor, dtype)


normal = functools.partial(Random, jax.random.normal)
uniform = functools.partial(Random, functools.partial(jax.random.uniform, minval=-1.0))


def initial_values(parameters: Mapping[str, tuple[Sequence[str], nnx.Param]], shardings: Mapping[str, NamedSharding],
                   key: jax.Array) -> dict[str, jax.Array]:
  """The values of `parameter`s at step 0, each a function of the key and of its name alone, such as 'blocks/3/mlp/up/kernel'.

  A stacked parameter has a name per layer, and its layers are drawn like parameters with these names; those without a name are zero.
  Random ones of equal shapes and shardings are drawn by one loop: one draw after the other takes as long to compile as the train step.
  """
  values: dict[str, jax.Array] = {}
  alike: dict[tuple, list[tuple[str, np.uint32]]] = collections.defaultdict(list)
  for name, (names, param) in parameters.items():
    init, shape, numbers = param.get_metadata('init'), param.get_value().shape, _numbers(names)
    if 'layers' in param.get_metadata('axes'):
      layers = jax.vmap(lambda number: init(jax.random.fold_in(key, number), shape[1:], jnp.float32))(numbers)
      values[name] = layers if all(names) else layers * np.reshape([bool(one) for one in names], (-1,) + (1,) * (len(shape) - 1))
    elif isinstance(init, Random):
      alike[init, shape, shardings[name] if shardings[name].mesh.size > 1 else None].append((name, *numbers))
    else:
      values[name] = init(jax.random.fold_in(key, numbers[0]), shape, jnp.float32)
  for (init, shape, _), members in alike.items():
    draw = lambda number: init(jax.random.fold_in(key, number), shape, jnp.float32)
    together, seeds = zip(*members)
    values |= zip(together, jax.lax.map(draw, np.stack(seeds)) if len(members) > 1 else [draw(seeds[0])])
  return values


def _numbers(names: Sequence[str]) -> np.ndarray:
  return np.array([int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'big') for name in names], np.uint32)


def layer_axes(param: nnx.Param) -> tuple[Axis, ...]:
  """Logical axes of one layer's parameter: inside a scan over layers the leading axis is gone."""
  return tuple(axis for axis in param.get_metadata('axes') if axis != 'layers')


def gathered(param: nnx.Param) -> Array:
  """A small parameter as the model computes with it: complete, in the dtype that it is read in."""
  return _gathered(as_weight(param.get_value()), param.get_metadata('dtype'))


def product(x: Float[Array, 'N I'], param: nnx.Param, rows: TokenAxis, transposed: bool = False,
            regather: bool = False) -> Float[Array, 'N O']:
  """x W, or x W^T. Where `model` splits the rows of x, they are gathered, here and in the backward pass.

  Args:
    param: W [I, O], or [O, I] if transposed here or in the parameter's metadata.
    rows: the mesh axis that splits the result's rows; a sum over a split dimension I is scattered over them.
    regather: whether to keep the compiler from holding the gathered W until the backward pass; in scans and recomputed blocks it cannot.
  """
  split, transposed = spec(*layer_axes(param)), transposed or param.get_metadata('transposed', False)
  out = PartitionSpec(rows, split[0 if transposed else 1])
  return _product(x, as_weight(param.get_value()), param.get_metadata('dtype'), split, out, transposed, regather)


def lookup(param: nnx.Param, ids: Int[Array, 'N'], rows: TokenAxis) -> Float[Array, 'N D']:
  """Rows of a table [V, D] by id; where `model` splits the table, each device looks up its own ids, and the rest is zero before the sum."""
  split, dtype = spec(*layer_axes(param))[0], param.get_metadata('dtype')
  return _lookup(as_weight(param.get_value()), ids, dtype, split, rows, param.get_metadata('size'))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight, dtype):
  return weight.read(dtype)


_gathered.defvjp(lambda weight, dtype: (weight.read(dtype), weight), lambda dtype, weight, gradient: (weight.cotangent(gradient),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _product(x, weight, dtype, split, out, transposed, regather):
  w = weight.read(dtype)
  if transposed:  # in this order XLA reads W as it is stored, however few rows x has
    return jnp.matmul(w, all_rows(x).T, out_sharding=PartitionSpec(*out[::-1])).T
  return jnp.matmul(all_rows(x), w, out_sharding=out)


def _product_backward(dtype, split, out, transposed, regather, saved, dy):
  x, weight = saved
  w = (weight.barrier() if regather else weight).read(dtype)
  inputs, dy = all_rows(x), all_rows(dy)
  dx = jnp.matmul(dy, w if transposed else w.T, out_sharding=jax.typeof(x).sharding.spec)
  a, b = (dy, inputs) if transposed else (inputs, dy)
  return dx, weight.cotangent_of_product(a, b, split)


_product.defvjp(lambda *inputs: (_product(*inputs), inputs[:2]), _product_backward)


def all_rows(x: Float[Array, 'N D']) -> Float[Array, 'N D']:
  """Activations with all rows of this device's group on each device of `model`."""
  return jax.reshard(x, PartitionSpec(None, jax.typeof(x).sharding.spec[1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _lookup(table, ids, dtype, split, rows, size):
  values = table.read(dtype)
  if split is None:
    return jax.reshard(values.at[ids].get(out_sharding=PartitionSpec(None, None)), PartitionSpec(rows, None))

  def local(values, ids):
    found, mine = _own_ids(ids, values.shape[0])
    return tensor_psum(jnp.where(mine[:, None], values[found], 0), scattered=rows is not None)
  return tensor_shard_map(local, (PartitionSpec(split, None), PartitionSpec(None)), PartitionSpec(rows, None))(values, ids)


def _lookup_backward(dtype, split, rows, size, saved, dy):
  table, ids = saved
  dy = all_rows(dy).astype(jnp.float32)
  if split is None:
    gradient = jnp.zeros((size, dy.shape[1]), jnp.float32).at[ids].add(dy)
  else:
    def local(ids, dy):
      own = size // jax.lax.axis_size(TENSOR_AXIS)
      found, mine = _own_ids(ids, own)
      return jnp.zeros((own, dy.shape[1]), jnp.float32).at[jnp.where(mine, found, own)].add(dy, mode='drop')
    gradient = tensor_shard_map(local, (PartitionSpec(None), PartitionSpec(None, None)), PartitionSpec(split, None))(ids, dy)
  return table.cotangent(gradient), None


_lookup.defvjp(lambda *inputs: (_lookup(*inputs), inputs[:2]), _lookup_backward)


def _own_ids(ids: Int[Array, 'N'], rows: int) -> tuple[Int[Array, 'N'], Array]:
  """Inside `tensor_shard_map`: places of ids in this device's `rows` rows of a table, and which of them it has."""
  found = ids - jax.lax.axis_index(TENSOR_AXIS) * rows
  mine = (found >= 0) & (found < rows)
  return jnp.where(mine, found, 0), mine


def tensor_psum(x: Array, scattered: bool = False) -> Array:
  """Inside `tensor_shard_map`: the sum of all devices' arrays; if scattered, this device's part of its rows."""
  if scattered:
    return jax.lax.psum_scatter(x, TENSOR_AXIS, scatter_dimension=0, tiled=True)
  return jax.lax.psum(x, TENSOR_AXIS)
