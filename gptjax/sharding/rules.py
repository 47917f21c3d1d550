"""The one table from logical axes to mesh axes, and the ZeRO rule on top of it."""

import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.sharding.mesh import AnyMesh

RULES: dict[str | None, str | tuple[str, ...] | None] = {
  'batch': ('replica', 'data'),  # sequences, or sequences and positions flattened to one axis
  'tokens': ('replica', 'data', 'model'),  # the flattened axis between blocks, under sequence parallelism
  'vocab': 'model',
  'heads': 'model',
  'kv_heads': 'model',
  'mlp': 'model',
  'embed': None,
  'head_width': None,
  'positions': None,
  'layers': None,
  None: None,
}
"""Where each logical axis of a parameter or an activation lies while the model computes."""

Axis = str | tuple[str, int] | None
"""A logical axis by its name; (name, parts) where only so many parts may come apart: an axis of 2 heads of 64 features is
('kv_heads', 2). Parts that the mesh axis does not divide, or that it has one device for, stay together on every device of it."""


def spec(*axes: Axis, mesh: AnyMesh | None = None) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes while the model computes; `mesh`: default, the one in force."""
  return PartitionSpec(*(_lies(axis, mesh) for axis in axes))


def _lies(axis: Axis, mesh: AnyMesh | None):
  if not isinstance(axis, tuple):
    return RULES[axis]
  name, parts = axis
  size = (mesh or jax.sharding.get_abstract_mesh()).shape[RULES[name]]
  return None if size == 1 or parts % size else RULES[name]


@dataclasses.dataclass(frozen=True)
class Places:
  """Where a parameter and what belongs to it lie."""

  compute: PartitionSpec
  """the parameter while a matrix product reads it"""
  stored: PartitionSpec
  """the parameter between steps"""
  gradient: PartitionSpec
  optimizer: PartitionSpec
  """its moments; the update happens here"""


def places(axes: tuple[Axis, ...], shape: tuple[int, ...], stage: int, copied: bool, mesh: AnyMesh) -> Places:
  """What `data` shares out at a stage of ZeRO (arXiv:1910.02054, section 5): 0 nothing, 1 the optimizer state, 2 gradients
  too, 3 parameters too.

  Args:
    axes, shape: of the parameter.
    stage: 0 to 3.
    copied: whether products read it in another type than the float32 it is kept in. Then, as in the paper's mixed precision, the
      float32 original belongs to the optimizer state, and stages 1 and 2 gather a copy of it in that type once a step.
    mesh: only its sizes count.
  """
  whole, shared = spec(*axes, mesh=mesh), _shared(axes, shape, mesh)
  return Places(whole, stored=shared if stage == 3 or (stage and copied) else whole,
                gradient=shared if stage >= 2 else whole, optimizer=shared if stage else whole)


def _shared(axes: tuple[Axis, ...], shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
  """The spec with the first axis that can be shared out over `data` too.

  The first, because then a device's part lies in one piece, which exchanges move as it is; parts of the last axis are padded to the
  128 lanes of a TPU. The layers axis of stacked parameters stays whole, since each step of the scan needs all of one layer.
  """
  compute, sizes = spec(*axes, mesh=mesh), mesh.shape
  for i, (axis, name) in enumerate(zip(axes, compute)):
    if axis != 'layers' and shape[i] % (sizes['data'] * (1 if name is None else sizes[name])) == 0:
      return PartitionSpec(*compute[:i], 'data' if name is None else (name, 'data'), *compute[i + 1:])
  return compute


def undivided(axes: tuple[Axis, ...], shape: tuple[int, ...], stage: int, mesh: AnyMesh) -> dict[str, int]:
  """The mesh axes that should split a parameter and do not, each with the size that it does not divide."""
  found: dict[str, int] = {}
  for axis in axes:
    if isinstance(axis, tuple) and axis[1] % mesh.shape['model']:  # all that come in parts lie over `model`
      found['model'] = axis[1]
  if stage and mesh.shape['data'] > 1 and _shared(axes, shape, mesh) == spec(*axes, mesh=mesh):
    found['data'] = max((size for axis, size in zip(axes, shape, strict=True) if axis != 'layers'), default=1)
  return found


def place(mesh: Mesh, tree, *axes: Axis):
  """Puts host arrays on the mesh with these logical axes."""
  return jax.device_put(tree, NamedSharding(mesh, spec(*axes, mesh=mesh)))


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
