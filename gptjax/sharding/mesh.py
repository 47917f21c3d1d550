"""The mesh: every device of the run on three named axes."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from gptjax.config import Config, MeshConfig, ModelConfig, UserError

AXES = ('replica', 'data', 'model')
"""From the slowest network to the fastest."""

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or only its sizes, which is enough to describe a state and to plan."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges devices (default: all) as (replica, data, model) with Explicit axes: shardings are part of an array's type.

  Where the devices are of several slices (groups with a fast network inside and a slower one between), a group of
  `mesh.replica` lies within a slice or is made of whole ones, and `model` never leaves a slice. Processes without slices, such
  as those on CPUs, stand for them: a group is made of whole processes, or a process has whole groups.

  Raises:
    UserError: the devices do not suffice or do not divide.
  """
  devices = list(jax.devices() if devices is None else devices)
  count, outer = len(devices), config.replica * config.model
  for field, value, limit in (('mesh.replica', config.replica, count), ('mesh.model', config.model, count // config.replica)):
    if value > limit or (config.data == -1 and limit % value):
      expected = ', '.join(str(n) for n in range(1, limit + 1) if limit % n == 0)
      of = '' if limit == count else f' that mesh.replica={config.replica} leaves'
      raise UserError(field, value, f'a divisor of the {limit} devices{of}: {expected}')
  data = count // outer if config.data == -1 else config.data
  others = (f'mesh.replica={config.replica} and ' if config.replica > 1 else '') + f'mesh.model={config.model}'
  if data * outer > count:
    raise UserError('mesh.data', config.data, f'-1 or at most {count // outer} with {count} devices and {others}')
  if data * outer < count and jax.process_count() > 1:
    raise UserError('mesh.data', config.data, f'all {count} devices when several processes join: mesh.data={count // outer}')
  return Mesh(_arranged(config.replica, data, config.model, devices[:data * outer]), AXES, axis_types=(AxisType.Explicit,) * 3)


def _arranged(replica: int, data: int, model: int, devices: Sequence[Any]) -> np.ndarray:
  """The devices as [replica, data, model], from the slowest network to the fastest."""
  kind = 'slice' if len({getattr(device, 'slice_index', 0) for device in devices}) > 1 else 'process'
  count = len({getattr(device, f'{kind}_index') for device in devices})
  if replica % count and count % replica and (kind == 'slice' or replica > 1):
    numbers = ', '.join(str(n) for n in range(1, count + 1) if count % n == 0)
    raise UserError('mesh.replica', replica, f'a divisor or a multiple of the {count} {"slices" if kind == "slice" else "processes"} '
                    f'of the {len(devices)} devices: {numbers}, {2 * count}, ...')
  if kind == 'process':  # devices are in the order of their processes, which is that of the axes
    return mesh_utils.create_device_mesh((replica, data, model), devices, allow_split_physical_axes=True)
  within = len(devices) // count
  if within % model:
    raise UserError('mesh.model', model, f'a divisor of the {within} devices of a slice: '
                    f'{", ".join(str(n) for n in range(1, within + 1) if within % n == 0)}')
  # What of replica is beyond the slices lies within them; what of the slices is beyond replica, data spans.
  between = math.gcd(replica, count)
  return mesh_utils.create_hybrid_device_mesh(
    (replica // between, data * between // count, model), (between, count // between, 1), devices, allow_split_physical_axes=True)


def row_groups(mesh: AnyMesh) -> int:
  """Into how many parts the rows of a batch are cut: the sizes of `replica` and `data`."""
  return mesh.shape['replica'] * mesh.shape['data']


def describe(mesh: Mesh) -> str:
  """The mesh in words: 'data 4 x model 2', and the replicas where there are several."""
  return ' x '.join(f'{name} {size}' for name, size in mesh.shape.items() if size > 1 or name != 'replica')


def check_sizes(config: Config, mesh: AnyMesh) -> None:
  """Raises a UserError for a batch, heads or tokens that the mesh cannot split."""
  sizes, m = mesh.shape, config.model
  shared, model = row_groups(mesh), sizes['model']
  if config.microbatch_size % shared:
    axes = 'mesh.data' if sizes['replica'] == 1 else 'mesh.replica * mesh.data'
    size = shared * config.microbatches
    part = '' if config.microbatches == 1 else f' * microbatches={config.microbatches}'
    raise UserError('batch_size', config.batch_size, f'a multiple of {axes}={shared}{part}: {_nearest(config.batch_size, size)}')
  check_heads(m, mesh)
  tokens = config.microbatch_size // shared * config.data.context
  if m.sequence_parallel and tokens % model:
    raise UserError('model.sequence_parallel', True, f'false, or a multiple of mesh.model={model} tokens on a device, not {tokens}')


def check_heads(config: ModelConfig, mesh: AnyMesh) -> None:
  """Raises a UserError for heads that the mesh cannot split."""
  heads, model = config.heads, mesh.shape['model']
  if heads % model:
    fitting = ', '.join(str(n) for n in range(1, mesh.size + 1) if heads % n == 0 and mesh.size % n == 0)
    raise UserError('mesh.model', model, f'a divisor of model.heads={heads} and of the {mesh.size} devices: {fitting}')


def _nearest(value: int, factor: int) -> str:
  below = value // factor * factor
  return f'{below} or {below + factor}' if below else str(factor)
