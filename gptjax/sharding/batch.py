"""The rows of a batch: which of them a process loads and a device computes, and a shard_map in which rows are local."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh
from jaxtyping import Array, Int

from gptjax.config import BATCH_AXES, LOCAL_AXES, TENSOR_AXIS, TOKENS_AXIS
from gptjax.sharding.context import token_order
from gptjax.sharding.mesh import AnyMesh, batch_shards

BATCH_SPEC = PartitionSpec(BATCH_AXES)
"""Of an array whose first dimension is the rows of a batch."""
TOKENS_SPEC = PartitionSpec(BATCH_AXES, TOKENS_AXIS)
"""Of an array [B, T] of a batch whose tokens are in the order of `token_order`."""


def batch_shard_map(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """A shard_map over each device's own rows: all mesh axes are manual but that of tensor parallelism, which is explicit.

  Inside, arrays have the shapes of one device's rows, and data crosses manual axes only by the function's own collectives. The specs
  name manual axes only; arrays that the explicit axis splits stay split along it. At the border of a shard_map JAX would gather them along
  an explicit axis, so that this axis is automatic there. The check of replication (check_vma) is off, because arrays' types drop mesh axes
  of size 1 while the axis names of a `psum` do not.
  """
  def run(*args):
    split: list[Any] = []

    def inside(*args):
      out = function(*args)
      split.append(jax.tree.map(_tensor, out))
      return out

    explicit = jax.sharding.explicit_axes(inside, axes=TENSOR_AXIS, in_sharding=jax.tree.map(_tensor, args))
    mesh = jax.sharding.get_abstract_mesh()
    splitting = tuple(name for name in LOCAL_AXES if mesh.shape[name] > 1)  # types may name axes of size 1 that the specs do not
    is_spec = lambda x: isinstance(x, PartitionSpec)
    specs = jax.tree.map(lambda spec: _only(spec, splitting), in_specs, is_leaf=is_spec)
    mapped = jax.shard_map(explicit, in_specs=specs, out_specs=out_specs, axis_names={*LOCAL_AXES}, check_vma=False)
    with use_abstract_mesh(mesh.update_axis_types({TENSOR_AXIS: AxisType.Auto})):
      out = mapped(*jax.tree.map(lambda spec, part: jax.tree.map(lambda x: jax.reshard(x, spec), part), specs, args, is_leaf=is_spec))
    return jax.reshard(out, jax.tree.map(lambda x, matrices: _both(_rows(x), matrices), out, split[-1]))
  return run


def tensor_shard_map(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """A shard_map that is manual over tensor parallelism's axis. Within `batch_shard_map`, all axes are manual then."""
  return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={TENSOR_AXIS}, check_vma=False)


def local(spec: PartitionSpec) -> PartitionSpec:
  """The part of a spec that `batch_shard_map` is manual over."""
  return _only(spec, LOCAL_AXES)


def _rows(x: Array) -> PartitionSpec:
  return local(jax.typeof(x).sharding.spec)


def _tensor(x: Array) -> PartitionSpec:
  return _only(jax.typeof(x).sharding.spec, (TENSOR_AXIS,))


def _only(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
  def kept(names):
    names = tuple(name for name in (names if isinstance(names, tuple) else (names,)) if name in axes)
    return names if len(names) > 1 else names[0] if names else None
  return PartitionSpec(*map(kept, spec))


def _both(rows: PartitionSpec, matrices: PartitionSpec) -> PartitionSpec:
  """The spec of an array whose rows and matrices are split, along different dimensions."""
  return PartitionSpec(*(a if b is None else b for a, b in itertools.zip_longest(rows, matrices)))


def padded_batch_size(mesh: AnyMesh, rows: int) -> int:
  """A number of rows rounded up, so that every group of devices gets equally many."""
  return -(-rows // batch_shards(mesh)) * batch_shards(mesh)


def row_numbers(count: int) -> Int[Array, 'B']:
  """Inside `batch_shard_map`: the places in the batch of this device's `count` rows."""
  return jax.lax.axis_index(BATCH_AXES) * count + jnp.arange(count)


def batch_psum(tree: Any, axes: tuple[str, ...] = LOCAL_AXES) -> Any:
  """Inside `batch_shard_map`: the sums of all devices' arrays. Axes of size 1 cost nothing."""
  axes = tuple(name for name in axes if jax.lax.axis_size(name) > 1)
  return jax.tree.map(lambda x: jax.lax.psum(x, axes), tree) if axes else tree


def tokens_psum(x: Array) -> Array:
  """The sum over the devices that share rows, for all of them; its gradient is that with respect to this device's part."""
  return x + jax.lax.stop_gradient(batch_psum(x, (TOKENS_AXIS,)) - x)


def manual_psum(tree: Any, axis: str) -> Any:
  """The sums over a mesh axis of arrays that a shard_map makes local to a device; outside of it arrays are complete."""
  mesh = jax.sharding.get_abstract_mesh()
  return batch_psum(tree, (axis,)) if axis in mesh.manual_axes else tree


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Which rows [n] of a batch the devices of this process compute, in order."""
  rows, sharding = np.arange(batch_size), NamedSharding(mesh, BATCH_SPEC)
  return np.unique(np.concatenate([rows[index] for index in sharding.addressable_devices_indices_map((batch_size,)).values()]))


def put_rows(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
  """Puts the rows of `process_rows` [n, T] on the mesh, as this process's part of arrays [batch_size, T]; tokens in `token_order`."""
  sharding, size = NamedSharding(mesh, TOKENS_SPEC), mesh.shape[TOKENS_AXIS]
  if size > 1:
    batch = {name: values[:, token_order(values.shape[1], size)] for name, values in batch.items()}
  if sharding.is_fully_addressable:
    return jax.device_put(batch, sharding)
  rows, mine = np.arange(batch_size), process_rows(mesh, batch_size)
  part = lambda values: lambda index: values[np.searchsorted(mine, rows[index[0]]), index[1]]  # a device's, of this process's
  return {name: jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part(values)) for name, values in batch.items()}
