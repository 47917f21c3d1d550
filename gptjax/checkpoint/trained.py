"""Loads trained models from their workdirs."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from gptjax import config as configs
from gptjax.checkpoint.checkpoints import Checkpoints
from gptjax.config import Config, MeshConfig, UserError
from gptjax.model import Blueprint, Parameters, attention_backend, blueprint
from gptjax.sharding import check_heads, describe, make_mesh


@dataclasses.dataclass(frozen=True)
class Trained:
  """Parameters of one checkpoint on the devices that are present, which may differ from those used in training."""

  config: Config
  blueprint: Blueprint
  mesh: Mesh
  parameters: Parameters
  step: int

  @property
  def description(self) -> str:
    """One line: the step, the devices and how the model is computed."""
    devices = self.mesh.devices.flatten()
    model = self.blueprint.config
    return (f'restored step {self.step}; {len(devices)} {devices[0].device_kind}, mesh {describe(self.mesh)}; '
            f'attention {attention_backend(model, self.config.data.context)}, {model.compute_dtype}')


def read_config(workdir: Path) -> Config:
  """Returns the config of the run in a folder.

  Raises:
    UserError: there is no run, or its config is damaged.
  """
  file = workdir / 'config.json'
  if not file.exists():
    raise UserError('--workdir', str(workdir), 'a folder that gptjax.train made, with its config.json')
  return configs.read(file)


def load_trained(workdir: Path, step: str = 'latest', model_axis: int = 0) -> Trained:
  """Restores the parameters of a run onto all devices, sharded along `model` and otherwise replicated.

  Args:
    workdir: of the run.
    step: 'latest', 'best' or a number.
    model_axis: size of the mesh axis `model`; 0: as in training if it divides the number of devices, else 1.

  Raises:
    UserError: no run in the folder, no such checkpoint, or a mesh that does not fit the devices or heads.
  """
  with Restorer(workdir, model_axis) as restorer:
    return restorer.restore(restorer.checkpoints.resolve(step))


class Restorer:
  """Restores several checkpoints of a run onto the same mesh, so that a program compiled for one serves all. A context manager.

  Args:
    workdir, model_axis: as in `load_trained`.

  Raises:
    UserError: no run in the folder, or a mesh that does not fit the devices or heads.
  """

  def __init__(self, workdir: Path, model_axis: int = 0):
    self.config = read_config(workdir)
    # The attention backend depends on the devices that are present, not on those of training.
    model = dataclasses.replace(self.config.model, attention='auto', sequence_parallel=False)
    self.blueprint = blueprint(model, self.config.data.context)
    fits = jax.device_count() % self.config.mesh.model == 0
    self.mesh = make_mesh(MeshConfig(model=model_axis or (self.config.mesh.model if fits else 1)))
    check_heads(model, self.mesh)
    self.checkpoints = Checkpoints(workdir / 'checkpoints')

  def restore(self, step: int) -> Trained:
    """Restores the parameters of a step in the dtypes that the model computes with.

    Raises:
      UserError: the checkpoint does not fit the run's config.
    """
    shardings = self.blueprint.shardings(0, self.mesh)
    abstract = {name: jax.ShapeDtypeStruct(s.shape, self.blueprint.dtypes[name], sharding=shardings[name])
                for name, s in self.blueprint.shapes.items()}
    return Trained(self.config, self.blueprint, self.mesh, self.checkpoints.restore_parameters(step, abstract), step)

  def __enter__(self) -> 'Restorer':
    return self

  def __exit__(self, *error: object) -> None:
    self.checkpoints.close()
