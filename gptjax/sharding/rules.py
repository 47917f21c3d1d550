"""The one table from logical axes to mesh axes, and the ZeRO rule on top of it."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.sharding.mesh import AnyMesh

RULES: dict[str | None, str | tuple[str, ...] | None] = {
  'batch': ('replica', 'data'),  # sequences, or sequences and positions flattened to one axis
  'vocab': 'model',
  'heads': 'model',
  'mlp': 'model',
  'embed': None,
  'head_width': None,
  'positions': None,
  'layers': None,
  None: None,
}
"""Where each logical axis of a parameter or an activation lies while the model computes."""

SMALLEST_SHARDED = 1024
"""ZeRO leaves parameters of fewer elements whole: gathering them costs more than they take."""


def spec(*axes: str | None) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes while the model computes."""
  return PartitionSpec(*(RULES[axis] for axis in axes))


def stored_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], zero_stage: int, mesh: AnyMesh) -> PartitionSpec:
  """The PartitionSpec of a parameter between steps.

  At stage 3 (arXiv:1910.02054, section 5.3) the largest axis that `model` leaves whole and `data` divides is shared out
  over `data`; the layers axis of stacked parameters stays whole, since each step of the scan needs all of one layer.
  """
  compute = spec(*axes)
  if zero_stage < 3 or math.prod(shape) < SMALLEST_SHARDED:
    return compute
  free = [i for i, axis in enumerate(axes) if compute[i] is None and axis != 'layers' and shape[i] % mesh.shape['data'] == 0]
  if not free:
    return compute
  chosen = max(free, key=lambda i: shape[i])
  return PartitionSpec(*('data' if i == chosen else name for i, name in enumerate(compute)))


def place(mesh: Mesh, tree, *axes: str | None):
  """Puts host arrays on the mesh with these logical axes."""
  return jax.device_put(tree, NamedSharding(mesh, spec(*axes)))


def my_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Which rows [n] of a batch the devices of this process hold, in order."""
  sharding = NamedSharding(mesh, spec('batch'))
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[index] for index in sharding.addressable_devices_indices_map((batch_size,)).values()]))


def place_rows(mesh: Mesh, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
  """Puts the rows of `my_rows` [n, T] on the mesh, as this process's part of arrays [batch_size, T]."""
  sharding = NamedSharding(mesh, spec('batch', None))
  if sharding.is_fully_addressable:
    return jax.device_put(batch, sharding)
  mine = my_rows(mesh, batch_size)

  def put(values: np.ndarray) -> jax.Array:
    def part(index):
      first, stop, _ = index[0].indices(batch_size)
      at = int(np.searchsorted(mine, first))
      return values[at:at + stop - first]
    return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, part)

  return jax.tree.map(put, batch)
