"""Loads trained models from their workdirs, and single tensors from checkpoints."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from gptjax.checkpoint.adapters import parameter_reader
from gptjax.checkpoint.arrays import array_folder, array_metadata, load
from gptjax.checkpoint.manifest import verify
from gptjax.config import TENSOR_AXIS, Config, MeshConfig, UserError, read_config
from gptjax.model import AbstractModel, Parameters, attention_backend, stored_model
from gptjax.sharding import check_heads, describe, make_mesh

_CHUNK_BYTES = 2**28
"""Bytes of tensors to load at once; each load takes a quarter of a second regardless of its size."""


@dataclasses.dataclass(frozen=True)
class Trained:
  """Parameters of one checkpoint on the devices that are present, which may differ from those used in training."""

  config: Config
  model: AbstractModel
  mesh: Mesh
  parameters: Parameters
  step: int

  @property
  def description(self) -> str:
    """One line: the step, the devices and how the model is computed."""
    devices = self.mesh.devices.flatten()
    return (f'restored step {self.step}; {len(devices)} {devices[0].device_kind}, mesh {describe(self.mesh)}; '
            f'attention {attention_backend(self.config.model, self.model.compute, self.config.data.context)}, {self.model.compute.dtype}')


def load_trained(workdir: Path, step: str = 'latest', model_axis: int = 0) -> Trained:
  """Restores the parameters of a run (`step`: 'latest', 'best' or a number) onto all devices, sharded along `model`, otherwise replicated.

  `model_axis`: size of that axis; 0: as in training if it divides the devices, else 1. A UserError if run, checkpoint or mesh do not fit.
  """
  restorer = Restorer(workdir, model_axis)
  return restorer.restore(restorer.checkpoints.resolve(step))


def on_devices(config: Config, model_axis: int = 0) -> tuple[AbstractModel, Mesh]:
  """The model of a config without adapters, and the mesh of all devices. These decide how it is computed, but not how layers are stored."""
  compute = dataclasses.replace(config.compute, attention='auto', sequence_parallel=False)
  trained_on = config.mesh.sizes[TENSOR_AXIS]
  mesh = make_mesh(MeshConfig(**{TENSOR_AXIS: model_axis or (1 if jax.device_count() % trained_on else trained_on)}))
  check_heads(config.model, mesh)
  return stored_model(dataclasses.replace(config, compute=compute)).base, mesh


class Restorer:
  """Restores several checkpoints of a run, as `load_trained` does, onto the same mesh: a program compiled for one serves all. Adapters are
  merged into the matrices that they adapt."""

  def __init__(self, workdir: Path, model_axis: int = 0):
    self.config = read_config(workdir)
    self.model, self.mesh = on_devices(self.config, model_axis)
    self.checkpoints = parameter_reader(workdir / 'checkpoints', self.config)

  def restore(self, step: int) -> Trained:
    """Restores the parameters of a step in the dtypes that the model computes with; a UserError if they do not fit the run's config."""
    shardings = self.model.shardings(0, self.mesh)
    abstract = {name: jax.ShapeDtypeStruct(s.shape, self.model.dtypes[name], sharding=shardings[name])
                for name, s in self.model.shapes.items()}
    return Trained(self.config, self.model, self.mesh, self.checkpoints.restore_parameters(step, abstract), step)


class Contents:
  """Tensors of an intact checkpoint (else a UserError): 'step', 'trained/NAME', 'frozen/NAME', 'optimizer/.../NAME', 'statistics/...'."""

  def __init__(self, folder: Path):
    self._folder = array_folder(folder)
    if wrong := verify(folder):
      raise UserError('checkpoint', str(folder), f'an intact checkpoint; {wrong}')
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    self.shapes = {name: jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=sharding)
                   for name, found in array_metadata(self._folder).items()}

  def read(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields these tensors in order, with only some of them in memory at a time."""
    chunk: list[str] = []
    for name in names:
      if chunk and sum(shape.size * shape.dtype.itemsize for shape in (self.shapes[one] for one in (*chunk, name))) > _CHUNK_BYTES:
        yield from self._load(chunk)
        chunk = []
      chunk.append(name)
    yield from self._load(chunk)

  def _load(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    loaded = load(self._folder, {name: self.shapes[name] for name in names})
    for name in names:
      yield name, np.asarray(loaded[name])
