"""A trained model out of its workdir."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from gptjax import config as configs
from gptjax.checkpoint.checkpoints import Checkpoints
from gptjax.config import Config, MeshConfig, UserError
from gptjax.model import Blueprint, Parameters, attention_backend, blueprint
from gptjax.processes import share
from gptjax.sharding import check_heads, describe, make_mesh


@dataclasses.dataclass(frozen=True)
class Trained:
  """Parameters of one checkpoint, placed on this process's devices, which may be others than those that trained them."""

  config: Config
  blueprint: Blueprint
  mesh: Mesh
  parameters: Parameters
  step: int

  @property
  def description(self) -> str:
    """One line: what was restored and how it is computed."""
    devices = self.mesh.devices.flatten()
    model = self.blueprint.config
    return (f'restored step {self.step}; {len(devices)} {devices[0].device_kind}, mesh {describe(self.mesh)}; '
            f'attention {attention_backend(model, self.config.data.context)}, {model.compute_dtype}')


def config_of(workdir: Path) -> Config:
  """The config of the run in a folder.

  Raises:
    UserError: there is no run, or its config is damaged.
  """
  file = workdir / 'config.json'
  if not file.exists():
    raise UserError('--workdir', str(workdir), 'a folder that gptjax.train made, with its config.json')
  return configs.from_json(file.read_text(), str(file))


def load_trained(workdir: Path, step: str = 'latest', model_axis: int = 0) -> Trained:
  """Restores the parameters of a run onto all devices, each with a whole copy or, where they divide, a part over `model`.

  Args:
    workdir: of the run.
    step: 'latest', 'best' or a number.
    model_axis: devices of the mesh's axis `model`; 0: as many as in training where they divide the devices here, else 1.

  Raises:
    UserError: no run in the folder, no such checkpoint, or a mesh that devices or heads do not allow.
  """
  config = config_of(workdir)
  # How it is computed is for the devices that are here now.
  plan = blueprint(dataclasses.replace(config.model, attention='auto', sequence_parallel=False), config.data.context)
  fits = jax.device_count() % config.mesh.model == 0
  mesh = make_mesh(MeshConfig(model=model_axis or (config.mesh.model if fits else 1)))
  check_heads(config.model, mesh)
  checkpoints = Checkpoints(workdir / 'checkpoints')
  try:
    number = share('checkpoint', checkpoints.resolve(step))
    shardings = plan.shardings(0, mesh)
    abstract = {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings[name]) for name, s in plan.shapes.items()}
    return Trained(config, plan, mesh, checkpoints.restore_parameters(number, abstract), number)
  finally:
    checkpoints.close()
