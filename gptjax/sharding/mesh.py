"""The mesh: every device of the run on the named axes of the table in gptjax/config/mesh.py."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config import (
  AXES, AXIS_NAMES, BATCH_AXES, EXPERTS_AXIS, LAYERS_AXIS, LOCAL_AXES, REST_AXIS, SLICE_AXES, STATE_AXIS, TENSOR_AXIS, TOKENS_AXIS,
  Config, MeshConfig, ModelConfig, UserError, divisors)

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or only its sizes, which is enough to describe a state and to plan."""

_EXPLICIT = (AxisType.Explicit,) * len(AXES)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges devices (default: all) on the axes of the table, with Explicit axis types: shardings are part of an array's type.

  Where the devices belong to several slices (groups with a fast network inside and a slower one between), axes that may cross slices
  are laid over them first, and the axis that splits matrices never leaves a slice. Without slices, as on CPUs, processes take their place.
  Raises a UserError if there are too few devices, or the sizes do not divide them.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = mesh_sizes(config, len(devices))
  used = math.prod(sizes.values())
  if used < len(devices) and jax.process_count() > 1:
    rest = sizes[REST_AXIS] * len(devices) // used
    raise UserError(f'mesh.{REST_AXIS}', sizes[REST_AXIS],
                    f'all {len(devices)} devices when several processes join: mesh.{REST_AXIS}={rest}')
  return Mesh(_arranged(sizes, devices[:used]), AXIS_NAMES, axis_types=_EXPLICIT)


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
  """A mesh of these sizes without devices; axes that are not named have size 1."""
  return AbstractMesh(tuple(sizes.get(name, 1) for name in AXIS_NAMES), AXIS_NAMES, axis_types=_EXPLICIT)


def mesh_sizes(config: MeshConfig, count: int) -> dict[str, int]:
  """The size of each axis on `count` devices; raises a UserError if there are too few, or the sizes do not divide them."""
  sizes, rest, limit = config.sizes, config.sizes[REST_AXIS], count
  taken: list[str] = []
  for name, size in sizes.items():
    if name == REST_AXIS:
      continue
    if size > limit or (rest < 0 and limit % size):
      of = f' that {" and ".join(taken)} leaves' if taken else ''
      raise UserError(f'mesh.{name}', size, f'a divisor of the {limit} devices{of}: {divisors(limit)}')
    limit //= size
    taken += [f'mesh.{name}={size}'] if size > 1 else []
  if rest > limit:
    raise UserError(f'mesh.{REST_AXIS}', rest, f'-1 or at most {limit} with {" and ".join([f"{count} devices", *taken])}')
  return sizes | {REST_AXIS: limit if rest < 0 else rest}


def _arranged(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
  """The devices with one dimension per axis, from the slowest network to the fastest."""
  kind = 'slice' if len({getattr(device, 'slice_index', 0) for device in devices}) > 1 else 'process'
  count = len({getattr(device, f'{kind}_index') for device in devices})
  for axis in AXES:
    size = sizes[axis.name]
    if axis.crosses_slices and size % count and count % size and (kind == 'slice' or size > 1):
      raise UserError(f'mesh.{axis.name}', size, f'a divisor or a multiple of the {count} {"slices" if kind == "slice" else "processes"} '
                      f'of the {len(devices)} devices: {divisors(count)}, {2 * count}, ...')
  if kind == 'process':  # devices are in the order of their processes, which is that of the axes
    return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
  between: dict[str, int] = {}
  left = count
  for name, size in sizes.items():  # slow axes first take the slices
    between[name] = math.gcd(size, left) if name != TENSOR_AXIS else 1
    left //= between[name]
  if left > 1:
    within = len(devices) // count
    raise UserError(f'mesh.{TENSOR_AXIS}', sizes[TENSOR_AXIS], f'a divisor of the {within} devices of a slice: {divisors(within)}')
  return mesh_utils.create_hybrid_device_mesh(
    tuple(size // between[name] for name, size in sizes.items()), tuple(between.values()), devices, allow_split_physical_axes=True)


_FOLDED = (STATE_AXIS, *(name for name in LOCAL_AXES if name not in (*SLICE_AXES, STATE_AXIS)))
"""Axes for which the first takes the place of all in a `folded` mesh."""


def folded(mesh: Mesh) -> Mesh:
  """The same devices with ZeRO's axis in place of those that divide layers, experts and tokens."""
  sizes = {name: 1 if name in _FOLDED else size for name, size in mesh.shape.items()}
  sizes[STATE_AXIS] = math.prod(mesh.shape[name] for name in _FOLDED)
  if sizes == dict(mesh.shape):
    return mesh
  order = sorted(AXIS_NAMES, key=lambda name: (name not in SLICE_AXES, name == TENSOR_AXIS, name != STATE_AXIS))
  devices = mesh.devices.transpose([AXIS_NAMES.index(name) for name in order])
  return Mesh(devices.reshape(tuple(sizes.values())), AXIS_NAMES, axis_types=_EXPLICIT)


def unfolded(spec: PartitionSpec) -> PartitionSpec:
  """The spec on a mesh of an array that has this one on the `folded` mesh: each device has the same part."""
  def names(entry):
    entry = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return tuple(name for one in entry for name in (_FOLDED if one == STATE_AXIS else (one,))) or None
  return PartitionSpec(*map(names, spec))


def gathered(spec: PartitionSpec) -> PartitionSpec:
  """The spec of an array that is complete along the axes which a `folded` mesh has not."""
  def names(entry):
    entry = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return tuple(name for name in entry if name not in _FOLDED[1:]) or None
  return PartitionSpec(*map(names, spec))


def viewed(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
  """The same array by the names of another mesh of the same devices; nothing is moved."""
  return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(mesh, spec), [shard.data for shard in x.addressable_shards])


def describe(mesh: AnyMesh) -> str:
  """The mesh in words: 'data 4 x model 2', with further axes where their size is above 1."""
  return ' x '.join(f'{name} {size}' for name, size in mesh.shape.items() if size > 1 or name in (STATE_AXIS, TENSOR_AXIS))


def batch_shards(mesh: AnyMesh) -> int:
  """Number of groups of rows into which the mesh divides a batch."""
  return math.prod(mesh.shape[name] for name in BATCH_AXES)


def check_sizes(config: Config, mesh: AnyMesh) -> None:
  """Raises a UserError for a batch, heads, experts or tokens that the mesh cannot divide."""
  groups, model = batch_shards(mesh), mesh.shape[TENSOR_AXIS]
  if config.microbatch_size % groups:
    axes = ' * '.join(f'mesh.{name}' for name in BATCH_AXES if mesh.shape[name] > 1)
    part = '' if config.microbatches == 1 else f' * microbatches={config.microbatches}'
    factor = groups * config.microbatches
    below = config.batch_size // factor * factor
    raise UserError('batch_size', config.batch_size,
                    f'a multiple of {axes}={groups}{part}: {f"{below} or {below + factor}" if below else factor}')
  check_heads(config.model, mesh)
  check_context(config, mesh)
  if config.model.experts % (count := mesh.shape[EXPERTS_AXIS]):
    raise UserError(f'mesh.{EXPERTS_AXIS}', count, f'a divisor of model.experts={config.model.experts}: {divisors(config.model.experts)}')
  tokens = config.microbatch_size // groups * config.data.context // mesh.shape[TOKENS_AXIS]
  if config.compute.sequence_parallel and tokens % model:
    raise UserError('compute.sequence_parallel', True,
                    f'false, or a multiple of mesh.{TENSOR_AXIS}={model} tokens on a device, not {tokens}')
  if config.gradient_noise:
    check_gradient_noise(config, mesh)


def check_gradient_noise(config: Config, mesh: AnyMesh) -> None:
  """Raises a UserError where a step has no gradients of parts of its batch to compare, each of rows of their own."""
  for name in (LAYERS_AXIS, TOKENS_AXIS, EXPERTS_AXIS):
    if mesh.shape[name] > 1:
      raise UserError(f'mesh.{name}', mesh.shape[name], '1 with gradient_noise')
  if config.model.experts:
    raise UserError('model.experts', config.model.experts, '0 with gradient_noise: the gradient of their balance is no mean over targets')
  at_once = mesh.shape[STATE_AXIS] if config.zero_stage >= 2 else 1
  if config.microbatches * batch_shards(mesh) == at_once:
    raise UserError('microbatches', config.microbatches, '2 or more with gradient_noise, which compares gradients of parts of a batch' + (
      f'; zero_stage={config.zero_stage} sums those of mesh.{STATE_AXIS} at once' if at_once > 1 else ''))


def check_context(config: Config, mesh: AnyMesh) -> None:
  """Raises a UserError for rows or an attention that cannot be divided by tokens."""
  size, length, attention = mesh.shape[TOKENS_AXIS], config.data.context, config.compute.attention
  if size == 1:
    return
  if length % (2 * size):
    parts, below = 2 * size, length // (2 * size) * 2 * size
    nearest = f'{below} or {below + parts}' if below else f'{parts}'
    raise UserError('data.context', length, f'a multiple of 2 * mesh.{TOKENS_AXIS}={parts}: {nearest}')
  if attention not in ('auto', 'blocks'):
    raise UserError('compute.attention', attention,
                    f'auto or blocks with mesh.{TOKENS_AXIS}={size}: compute.context_attention says how tokens attend')


def check_heads(config: ModelConfig, mesh: AnyMesh) -> None:
  """Raises a UserError for heads that the mesh cannot split."""
  heads, model = config.heads, mesh.shape[TENSOR_AXIS]
  if heads % model:
    fitting = ', '.join(str(n) for n in range(1, mesh.size + 1) if heads % n == 0 and mesh.size % n == 0)
    raise UserError(f'mesh.{TENSOR_AXIS}', model, f'a divisor of model.heads={heads} and of the {mesh.size} devices: {fitting}')
