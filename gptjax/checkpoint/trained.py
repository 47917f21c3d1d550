"""A trained model out of its workdir."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from gptjax import config as configs
from gptjax.checkpoint.checkpoints import Checkpoints
from gptjax.config import Config, MeshConfig, UserError
from gptjax.model import AbstractModel, Parameters, abstract_model, attention_backend
from gptjax.sharding import check_heads, describe, make_mesh


@dataclasses.dataclass(frozen=True)
class Trained:
  """Parameters of one checkpoint, placed on this process's devices, which may be others than those that trained them."""

  config: Config
  model: AbstractModel
  mesh: Mesh
  parameters: Parameters
  step: int

  @property
  def description(self) -> str:
    """One line: what was restored and how it is computed."""
    devices = self.mesh.devices.flatten()
    return (f'restored step {self.step}; {len(devices)} {devices[0].device_kind}, mesh {describe(self.mesh)}; '
            f'attention {attention_backend(self.config.model, self.model.compute, self.config.data.context)}, {self.model.compute.dtype}')


def read_config(workdir: Path) -> Config:
  """The config of the run in a folder.

  Raises:
    UserError: there is no run, or its config is damaged.
  """
  file = workdir / 'config.json'
  if not file.exists():
    raise UserError('--workdir', str(workdir), 'a folder that gptjax.train made, with its config.json')
  return configs.read(file)


def load_trained(workdir: Path, step: str = 'latest', model_axis: int = 0) -> Trained:
  """Restores the parameters of a run onto all devices, each with a whole copy or, where they divide, a part over `model`.

  Args:
    workdir: of the run.
    step: 'latest', 'best' or a number.
    model_axis: devices of the mesh's axis `model`; 0: as many as in training where they divide the devices here, else 1.

  Raises:
    UserError: no run in the folder, no such checkpoint, or a mesh that devices or heads do not allow.
  """
  with Restorer(workdir, model_axis) as restorer:
    return restorer.restore(restorer.checkpoints.resolve(step))


class Restorer:
  """Restores checkpoints of a run one after another onto the same mesh, so that a program compiled for one does for all. A context.

  Args:
    workdir, model_axis: as for `load_trained`.

  Raises:
    UserError: no run in the folder, or a mesh that devices or heads do not allow.
  """

  def __init__(self, workdir: Path, model_axis: int = 0):
    self.config = read_config(workdir)
    # The devices here decide how the model is computed, but not how its layers are stored.
    compute = dataclasses.replace(self.config.compute, attention='auto', sequence_parallel=False)
    self.model = abstract_model(self.config.model, compute, self.config.data.context)
    fits = jax.device_count() % self.config.mesh.model == 0
    self.mesh = make_mesh(MeshConfig(model=model_axis or (self.config.mesh.model if fits else 1)))
    check_heads(self.config.model, self.mesh)
    self.checkpoints = Checkpoints(workdir / 'checkpoints')

  def steps(self, wanted: str) -> list[int]:
    """The steps, oldest first, that 'all', a name or a list of names and numbers means; the same in every process.

    Raises:
      UserError: one of them is not there.
    """
    return self.checkpoints.resolve_all(wanted)

  def restore(self, step: int) -> Trained:
    """The parameters of a step.

    Raises:
      UserError: a checkpoint that does not fit the run's config.
    """
    shardings = self.model.shardings(0, self.mesh)
    # In the type that the model reads them in: nothing else is asked of them here.
    abstract = {name: jax.ShapeDtypeStruct(s.shape, self.model.dtypes[name], sharding=shardings[name])
                for name, s in self.model.shapes.items()}
    return Trained(self.config, self.model, self.mesh, self.checkpoints.restore_parameters(step, abstract), step)

  def __enter__(self) -> 'Restorer':
    return self

  def __exit__(self, *error: object) -> None:
    self.checkpoints.close()
