"""The mesh: every device of the run on three named axes."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from gptjax.config import Config, MeshConfig, ModelConfig, UserError


AXES = ('replica', 'data', 'model')
"""From the slowest network to the fastest."""

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or only its sizes, which is enough to describe a state and to plan."""


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges devices (default: all) as (replica, data, model) with Explicit axes: shardings are part of an array's type.

  Raises:
    UserError: the devices do not suffice or do not divide.
  """
  devices = list(jax.devices() if devices is None else devices)
  count, outer = len(devices), config.replica * config.model
  for field, value, limit in (('mesh.replica', config.replica, count), ('mesh.model', config.model, count // config.replica)):
    if value > limit or (config.data == -1 and limit % value):
      accepted = ', '.join(str(n) for n in range(1, limit + 1) if limit % n == 0)
      of = '' if limit == count else f' that mesh.replica={config.replica} leaves'
      raise UserError(field, value, f'a divisor of the {limit} devices{of}: {accepted}')
  data = count // outer if config.data == -1 else config.data
  others = (f'mesh.replica={config.replica} and ' if config.replica > 1 else '') + f'mesh.model={config.model}'
  if data * outer > count:
    raise UserError('mesh.data', config.data, f'-1 or at most {count // outer} with {count} devices and {others}')
  if data * outer < count and jax.process_count() > 1:
    raise UserError('mesh.data', config.data, f'all {count} devices when several processes join: mesh.data={count // outer}')
  types = (AxisType.Explicit,) * 3
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices > 1:  # jax.make_mesh knows one torus only
    if config.replica % slices or data * outer < count:
      raise UserError('mesh.replica', config.replica, f'a multiple of the {slices} slices, and a mesh of all {count} devices')
    inner = (config.replica // slices, data, config.model)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices), AXES, axis_types=types)
  return jax.make_mesh((config.replica, data, config.model), AXES, axis_types=types, devices=devices[:data * outer])


def describe(mesh: Mesh) -> str:
  """The mesh in words: 'data 4 x model 2', and the replicas where there are several."""
  return ' x '.join(f'{name} {size}' for name, size in mesh.shape.items() if size > 1 or name != 'replica')


def check_sizes(config: Config, mesh: AnyMesh) -> None:
  """Raises a UserError for a size of the config that the mesh does not divide."""
  model, shared = mesh.shape['model'], mesh.shape['replica'] * mesh.shape['data']
  if config.sequences % shared:
    part = ' / microbatches' if config.microbatches > 1 else ''
    axes = 'mesh.data' if mesh.shape['replica'] == 1 else 'mesh.replica * mesh.data'
    raise UserError('batch_size', config.batch_size, f'batch_size{part} a multiple of {axes}={shared}')
  m: ModelConfig = config.model
  for field, given, size in (
      ('model.heads', m.heads, m.heads), ('model.kv_heads', m.kv_heads, m.key_heads),
      ('model.mlp_width', m.mlp_width, m.hidden_width), ('model.vocab_multiple', m.vocab_multiple, m.table_rows)):
    if size % model:
      raise UserError(field, given, f'{size} to be a multiple of mesh.model={model}')
