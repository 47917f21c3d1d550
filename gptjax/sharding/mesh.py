"""The mesh: every device of the run on three named axes."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from gptjax.config import Config, MeshConfig, UserError


AXES = ('replica', 'data', 'model')
"""From the slowest network to the fastest."""


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
  return jax.make_mesh((config.replica, data, config.model), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices[:data * outer])


def describe(mesh: Mesh) -> str:
  """The mesh in words: 'data 4 x model 2', and the replicas where there are several."""
  return ' x '.join(f'{name} {size}' for name, size in mesh.shape.items() if size > 1 or name != 'replica')


def check_sizes(config: Config, mesh: Mesh) -> None:
  """Raises a UserError for a batch, heads or tokens that the mesh cannot split."""
  sizes, m = mesh.shape, config.model
  shared, model = sizes['replica'] * sizes['data'], sizes['model']
  if config.sequences % shared:
    axes = 'mesh.data' if sizes['replica'] == 1 else 'mesh.replica * mesh.data'
    size = shared * config.microbatches
    part = '' if config.microbatches == 1 else f' * microbatches={config.microbatches}'
    raise UserError('batch_size', config.batch_size, f'a multiple of {axes}={shared}{part}: {_nearest(config.batch_size, size)}')
  if m.heads % model:
    fitting = ', '.join(str(n) for n in range(1, mesh.size + 1) if m.heads % n == 0 and mesh.size % n == 0)
    raise UserError('mesh.model', model, f'a divisor of model.heads={m.heads} and of the {mesh.size} devices: {fitting}')
  tokens = config.sequences // shared * config.data.context
  if m.sequence_parallel and tokens % model:
    raise UserError('model.sequence_parallel', True, f'false, or a multiple of mesh.model={model} tokens on a device, not {tokens}')


def _nearest(value: int, factor: int) -> str:
  below = value // factor * factor
  return f'{below} or {below + factor}' if below else str(factor)
