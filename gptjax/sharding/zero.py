"""ZeRO (arXiv:1910.02054) inside `batch_shard_map`: weights that are gathered where they are read, and gradients that are reduced.

Stages 0 and 1 add up the gradients of all microbatches locally and reduce them once per step: all-reduce at stage 0, reduce-scatter at
stage 1. Stage 2 reduce-scatters with every microbatch, so that only a shard of the sum is kept. Stage 3 does so too, and gathers
each weight where a layer reads it, forward and backward.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from gptjax.config import LOCAL_AXES, STATE_AXIS
from gptjax.sharding.batch import local, tensor_shard_map, batch_psum
from gptjax.sharding.rules import ParameterSpecs, Shard

_TILE = 8
"""Rows of a tile of a TPU's memory. Its compiler pads and moves shards of rows (5 % of the traffic along `data` at 13B parameters), but not
shards of tiles, and viewing an array as tiles moves nothing."""


class Factors(NamedTuple):
  """The gradient of a matrix as the product that it is: a^T b, of a [N, I] and b [N, O] over N tokens."""

  a: Array | None
  """None: another matrix that reads the same array has it"""
  b: Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=('value', 'accumulator', 'factors'), meta_fields=('shard',))
@dataclasses.dataclass(frozen=True)
class Weight:
  """A parameter inside the train step: complete, or a shard of it."""

  value: Any  # an array; transformations of trees put other things in its place
  accumulator: Any = None
  """float32 zeros with respect to which the gradient is taken, because a gradient has the shape and dtype of its variable, and `value` may
  have others; None: it is taken with respect to `value`"""
  shard: Shard | None = None
  """how the variable of the gradient is sharded; None: it is complete"""
  factors: Factors | None = None
  """zeros with respect to which a backward pass gives the factors of a matrix's gradient, so that their product can be computed later"""

  @property
  def variable(self) -> Array:
    """The array with respect to which the gradient is taken."""
    return self.value if self.accumulator is None else self.accumulator

  def with_variable(self, variable: Array) -> 'Weight':
    """The same weight as a function of its variable."""
    return dataclasses.replace(self, value=variable) if self.accumulator is None else dataclasses.replace(self, accumulator=variable)

  def read(self, dtype: str) -> Array:
    """The complete weight in a dtype; gathered in that dtype where `value` is a shard."""
    value = self.value.astype(dtype)
    return gather(value, self.shard) if self.shard and self.accumulator is None else value

  def barrier(self) -> 'Weight':
    """The same weight behind an optimization barrier, so that the compiler does not keep an earlier gather."""
    return dataclasses.replace(self, value=jax.lax.optimization_barrier(self.value))

  def cotangent(self, gradient: Float[Array, '...']) -> 'Weight':
    """The cotangent of this weight in a backward pass, from this device's gradient of the complete one."""
    gradient = scatter(gradient.astype(jnp.float32), self.shard) if self.shard else gradient.astype(jnp.float32)
    if self.accumulator is None:
      return dataclasses.replace(self, value=gradient)
    return dataclasses.replace(self, value=jnp.zeros_like(self.value), accumulator=gradient)  # the gradient of `value` is not used

  def cotangent_of_product(self, a: Float[Array, 'N I'], b: Float[Array, 'N O'], split: PartitionSpec) -> 'Weight':
    """The cotangent of a matrix, split by this spec, from the factors of this device's gradient."""
    if self.factors is not None:
      return dataclasses.replace(jax.tree.map(jnp.zeros_like, self), factors=Factors(None if self.factors.a is None else a, b))
    return self.cotangent(jnp.einsum('na,nb->ab', a, b, preferred_element_type=jnp.float32, out_sharding=split))


def as_weight(value: Array | Weight) -> Weight:
  """A parameter outside the step is complete."""
  return value if isinstance(value, Weight) else Weight(value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def shared(weight: Weight, dtype: str) -> Weight:
  """A weight for several readers: it is gathered once, and the sum of their gradients is scattered once."""
  value = weight.read(dtype)
  return Weight(value, jnp.zeros(value.shape, jnp.float32, out_sharding=jax.typeof(value).sharding.spec))


shared.defvjp(lambda weight, dtype: (shared(weight, dtype), weight),
              lambda dtype, weight, gradients: (weight.cotangent(gradients.accumulator),))


def gather(x: Array, shard: Shard) -> Array:
  """All-gathers the shards into the complete weight."""
  split, dim = jax.typeof(x).sharding.spec, x.ndim + shard.dim

  def on_device(x):
    x = x if shard.parts == 1 else x.squeeze(dim - 1)  # compilers exchange arrays best whose first dimension is sharded
    return jax.lax.all_gather(x, STATE_AXIS, axis=x.ndim + shard.dim, tiled=True)

  # Inside, the array's matrix axis is manual, too: JAX would gather the array along that one as well.
  return tensor_shard_map(on_device, split, split if shard.parts == 1 else PartitionSpec(*split[:dim], *split[dim + 1:]))(x)


def scatter(x: Array, shard: Shard) -> Array:
  """This device's shard of the sum of all devices' gradients: the transpose of `gather`."""
  split, dim = jax.typeof(x).sharding.spec, x.ndim + shard.dim

  def on_device(x):
    rows = x.shape[dim] // jax.lax.axis_size(STATE_AXIS)
    tiled = dim == 0 and x.ndim > 1 and rows % _TILE == 0
    own = jax.lax.psum_scatter(x.reshape(-1, _TILE, *x.shape[1:]) if tiled else x, STATE_AXIS, scatter_dimension=dim, tiled=True)
    own = own.reshape(rows, *x.shape[1:]) if tiled else own
    return own if shard.parts == 1 else jnp.expand_dims(own, dim)

  # JAX cannot lower a reduce-scatter of an array that an explicit axis splits.
  return tensor_shard_map(on_device, split, split if shard.parts == 1 else PartitionSpec(*split[:dim + 1], None, *split[dim + 1:]))(x)


def _split(x: Array, shard: Shard | None) -> Array:
  """A dimension n that tensor parallelism splits first is viewed as (parts, n / parts), so that ZeRO shards each part."""
  if shard is None or shard.parts == 1:
    return x
  dim, split = x.ndim + shard.dim, jax.typeof(x).sharding.spec
  names = split[dim] if isinstance(split[dim], tuple) else (split[dim], None)
  shape = (*x.shape[:dim], shard.parts, x.shape[dim] // shard.parts, *x.shape[dim + 1:])
  return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(*split[:dim], *names, *split[dim + 1:]))


def _merge(x: Array, shard: Shard | None) -> Array:
  """The reverse of `_split`."""
  if shard is None or shard.parts == 1:
    return x
  dim, split = x.ndim + shard.dim, jax.typeof(x).sharding.spec
  names = split[dim - 1] if split[dim] is None else (split[dim - 1], split[dim])
  shape = (*x.shape[:dim - 1], x.shape[dim - 1] * x.shape[dim], *x.shape[dim + 1:])
  return jax.lax.reshape(x, shape, out_sharding=PartitionSpec(*split[:dim - 1], names, *split[dim + 1:]))


@dataclasses.dataclass(frozen=True)
class Zero:
  """One stage of ZeRO for the parameters of a model: how they enter `batch_shard_map`, and how gradients leave it."""

  stage: int
  specs: Mapping[str, ParameterSpecs]
  dtypes: Mapping[str, str]
  """in which matrix products read each parameter"""

  def enter(self, parameters: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays that the shard_map takes in place of parameters; stages 1 and 2 gather them here, once per step."""
    if self.stage in (1, 2):
      return {name: jax.reshard(p.astype(self.dtypes[name]), self.specs[name].compute) for name, p in parameters.items()}
    return {name: _split(p, self.specs[name].shard) for name, p in parameters.items()}

  @property
  def in_specs(self) -> dict[str, PartitionSpec]:
    """in_specs of the shard_map for the arrays that `enter` returns."""
    return {name: self._local(name, specs.stored if self.stage == 3 else specs.compute) for name, specs in self.specs.items()}

  def weights(self, entered: Mapping[str, Array], differentiated: bool = True) -> dict[str, Weight]:
    """Inside the shard_map: the weights of the model."""
    if self.stage in (0, 3) or not differentiated:
      return {name: Weight(value, shard=self.specs[name].shard if self.stage == 3 else None) for name, value in entered.items()}

    def weight(name: str, value: Array) -> Weight:
      shard = self.specs[name].shard if self.stage == 2 else None
      zeros = jnp.zeros(value.shape, jnp.float32, out_sharding=jax.typeof(value).sharding.spec)
      return Weight(value, _first(zeros, shard) if shard else zeros, shard)
    return {name: weight(name, value) for name, value in entered.items()}

  def reduce(self, gradients: Mapping[str, Float[Array, '...']]) -> dict[str, Array]:
    """Inside the shard_map, once per step: the sums over all devices that have the same part of a parameter; each device keeps the shard
    that matches its optimizer state."""
    def reduced(name, gradient):
      shard, axes = self.specs[name].shard, [axis for axis in LOCAL_AXES if axis not in self.specs[name].compute]
      if shard is not None:
        gradient = gradient if self.stage >= 2 else scatter(gradient, shard)
        axes.remove(STATE_AXIS)
      return batch_psum(gradient, tuple(axes))
    return {name: reduced(name, gradient) for name, gradient in gradients.items()}

  @property
  def summed_axes(self) -> tuple[str, ...]:
    """Mesh axes along which the gradient of each microbatch is summed at once, in place of the sum over all microbatches."""
    return (STATE_AXIS,) if self.stage >= 2 else ()

  def squared_norm(self, gradients: Mapping[str, Float[Array, '...']]) -> Float[Array, '']:
    """Inside the shard_map: that of the gradient of one microbatch, summed over the devices along `summed_axes`."""
    sharded = {name for name in gradients if self.summed_axes and self.specs[name].shard is not None}
    complete = batch_psum({name: g for name, g in gradients.items() if name not in sharded}, self.summed_axes)
    square = lambda arrays: sum((jnp.sum(jnp.square(g.astype(jnp.float32))) for g in arrays), jnp.float32(0))
    return square(complete.values()) + batch_psum(square(gradients[name] for name in sharded), self.summed_axes)

  def out_specs(self, names: Iterable[str]) -> dict[str, PartitionSpec]:
    """Specs of the gradients that `reduce` returns for these parameters."""
    return {name: self._local(name, self.specs[name].optimizer) for name in names}

  def leave(self, gradients: Mapping[str, Float[Array, '...']]) -> dict[str, Array]:
    """Gradients with the shapes of the parameters, sharded as the optimizer state is."""
    return {name: _merge(g, self.specs[name].shard) for name, g in gradients.items()}

  def _local(self, name: str, spec: PartitionSpec) -> PartitionSpec:
    shard = self.specs[name].shard
    if shard is None or shard.parts == 1 or not isinstance(spec[shard.dim], tuple):
      return local(spec)
    dim = len(spec) + shard.dim
    return local(PartitionSpec(*spec[:dim], *spec[dim], *spec[dim + 1:]))


def _first(x: Array, shard: Shard) -> Array:
  """An array of the shape of one shard of `x`: its first one."""
  x = _split(x, shard)
  dim = x.ndim + shard.dim
  return jax.lax.slice_in_dim(x, 0, x.shape[dim] // jax.lax.axis_size(STATE_AXIS), axis=dim)
