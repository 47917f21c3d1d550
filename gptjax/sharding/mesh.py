"""The mesh: every device of the run on two named axes."""

import jax
from jax.sharding import AxisType, Mesh

from gptjax.config import Config, MeshConfig, ModelConfig, UserError


def make_mesh(config: MeshConfig) -> Mesh:
  """Arranges the devices as (data, model) with Explicit axes, so that shardings are part of an array's type.

  Raises:
    UserError: the devices do not suffice or do not divide.
  """
  devices = jax.devices()
  count = len(devices)
  if config.model > count or (config.data == -1 and count % config.model):
    accepted = ', '.join(str(n) for n in range(1, count + 1) if count % n == 0)
    raise UserError('mesh.model', config.model, f'a divisor of the {count} devices: {accepted}')
  data = count // config.model if config.data == -1 else config.data
  if data * config.model > count:
    accepted = f'-1 or at most {count // config.model} with {count} devices and mesh.model={config.model}'
    raise UserError('mesh.data', config.data, accepted)
  if data * config.model < count and jax.process_count() > 1:
    accepted = f'all {count} devices when several processes join: mesh.data={count // config.model}'
    raise UserError('mesh.data', config.data, accepted)
  return jax.make_mesh((data, config.model), ('data', 'model'), axis_types=(AxisType.Explicit,) * 2,
                       devices=devices[:data * config.model])


def check_sizes(config: Config, mesh: Mesh) -> None:
  """Raises a UserError for a size of the config that the mesh does not divide."""
  data, model = mesh.shape['data'], mesh.shape['model']
  if config.sequences % data:
    part = ' / microbatches' if config.microbatches > 1 else ''
    raise UserError('batch_size', config.batch_size, f'batch_size{part} a multiple of mesh.data={data}')
  m: ModelConfig = config.model
  for field, given, size in (
      ('model.heads', m.heads, m.heads), ('model.kv_heads', m.kv_heads, m.key_heads),
      ('model.mlp_width', m.mlp_width, m.hidden_width), ('model.vocab_multiple', m.vocab_multiple, m.table_rows)):
    if size % model:
      raise UserError(field, given, f'{size} to be a multiple of mesh.model={model}')
