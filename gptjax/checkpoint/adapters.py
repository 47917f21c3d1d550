"""Checkpoints of runs with adapters: they hold the adapters, and the workdir holds the base, the model that they adapt, once."""

import os
import shutil
from collections.abc import Set
from pathlib import Path

import jax
from jax.sharding import Mesh

from gptjax.checkpoint.arrays import PARAMETERS, TRAINING
from gptjax.checkpoint.checkpoints import Checkpoints
from gptjax.config import Config, read_config, to_json
from gptjax.files import atomic_directory
from gptjax.model import AbstractModel, Parameters, stored_model, unstack_layers

BASE, REFERENCE, TEACHER = 'base', 'reference', 'teacher'
"""Folders of a workdir: the run whose model its adapters adapt, and those whose models are the reference and the teacher of its
objective."""


def keep_run(checkpoint: Path, config: Config, target: Path) -> None:
  """Makes `target` the folder of a run of one checkpoint of a run with this config, by links where the disk allows them, else by copies."""
  shutil.rmtree(target, ignore_errors=True)  # of a run that ended before its first checkpoint
  with atomic_directory(target, resumes=False) as folder:
    assert folder
    shutil.copytree(checkpoint, folder / 'checkpoints' / checkpoint.name, ignore=shutil.ignore_patterns(TRAINING), copy_function=_link)
    if config.lora.rank:
      shutil.copytree(base_of(checkpoint.parent), folder / BASE, copy_function=_link)
    (folder / 'config.json').write_text(to_json(config))


def _link(source: str, target: str) -> None:
  try:
    os.link(source, target)
  except OSError:  # another disk, or one without links
    shutil.copyfile(source, target)


def base_of(checkpoints: Path) -> Path:
  """The folder of the base, given that of a run's checkpoints."""
  return checkpoints.with_name(BASE)


def parameter_reader(checkpoints: Path, config: Config) -> Checkpoints:
  """The checkpoints in a folder, to read parameters of `stored_model(config).base` from."""
  return _Merged(checkpoints, config) if config.lora.rank else Checkpoints(checkpoints, folders=(PARAMETERS,))


class _Merged(Checkpoints):
  """Checkpoints of adapters, whose parameters are read as those of the base with the adapters merged."""

  def __init__(self, directory: Path, config: Config):
    super().__init__(directory, folders=(PARAMETERS,))
    self._model = stored_model(config)

  def restore_parameters(self, step: int, parameters: dict[str, jax.ShapeDtypeStruct]) -> Parameters:
    """As for other runs."""
    base, model = base_of(self.directory), self._model
    wanted = {one for name in parameters for one in model.unstacked_names(name)}
    trained = {one for name in model.trained_with_adapters for one in model.unstacked_names(name)}
    own = trained & (wanted | {name.replace('/kernel', f'/lora_{ab}') for name in wanted for ab in 'ab'})
    mesh = next(iter(parameters.values())).sharding.mesh  # type: ignore[union-attr]
    with jax.set_mesh(mesh):
      checkpoints = Checkpoints(base / 'checkpoints', folders=(PARAMETERS,))
      found = _unstacked(checkpoints, checkpoints.resolve('latest'), stored_model(read_config(base)), wanted - trained, mesh)
      found |= _unstacked(self, step, stored_model(read_config(self.folder(step))), own, mesh)
      merged = model.in_layout(model.merged(found))
      return {name: jax.reshard(merged[name].astype(leaf.dtype), leaf.sharding) for name, leaf in parameters.items()}


def _unstacked(checkpoints: Checkpoints, step: int, model: AbstractModel, wanted: Set[str], mesh: Mesh) -> Parameters:
  """The parameters with these names of unstacked layers, from a checkpoint of a model."""
  shardings = model.shardings(3, mesh)
  stored = {name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[name]) for name, shape in model.shapes.items()
            if not wanted.isdisjoint(model.unstacked_names(name))}
  arrays = unstack_layers(Checkpoints.restore_parameters(checkpoints, step, stored))
  return {name: value for name, value in arrays.items() if name in wanted}
