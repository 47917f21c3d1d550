"""A model's parameters as plain data: one flat dict from 'blocks/0/attention/q/kernel' to an array."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from gptjax.config import ModelConfig
from gptjax.model.transformer import Transformer
from gptjax.model.weights import Weight
from gptjax.sharding import AnyMesh, Axis, Places, places, undivided

Parameters = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
  """A transformer without its values: what initialisation, checkpoints, optimizer and counters are all derived from.

  `blueprint` returns the same one for equal configs, so that functions built from it can be cached by it.
  """

  config: ModelConfig
  context: int
  graph: Any
  variables: dict[str, tuple[tuple, nnx.Param]]

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter."""
    return {name: jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype) for name, (_, v) in self.variables.items()}

  @property
  def axes(self) -> dict[str, tuple[Axis, ...]]:
    """Logical axes of every parameter."""
    return {name: v.get_metadata('axes') for name, (_, v) in self.variables.items()}

  @property
  def dtypes(self) -> dict[str, str]:
    """The type in which the model reads every parameter."""
    return {name: v.get_metadata('dtype') for name, (_, v) in self.variables.items()}

  def places(self, zero_stage: int, mesh: AnyMesh) -> dict[str, Places]:
    """Where every parameter, its gradient and its optimizer state lie."""
    return {name: places(self.axes[name], shape.shape, zero_stage, self.dtypes[name] != shape.dtype, mesh)
            for name, shape in self.shapes.items()}

  def undivided(self, zero_stage: int, mesh: AnyMesh) -> tuple[float, list[str]]:
    """The share of the parameters' bytes that stays whole on devices that should split them, and which, in words."""
    sizes = {name: math.prod(shape.shape) for name, shape in self.shapes.items()}
    found = {name: undivided(self.axes[name], shape.shape, zero_stage, mesh) for name, shape in self.shapes.items()}
    words: dict[str, list[str]] = {}
    for name, axes in found.items():
      for axis, size in axes.items():
        words.setdefault(f'mesh.{axis}={mesh.shape[axis]} does not divide {size}', []).append(name)
    share = sum(sizes[name] for name, axes in found.items() if axes) / sum(sizes.values())
    return share, [f'{reason}: {_kinds(names)}' for reason, names in words.items()]

  def shardings(self, zero_stage: int, mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Where every parameter lies between steps."""
    return {name: NamedSharding(mesh, place.stored) for name, place in self.places(zero_stage, mesh).items()}

  def initialize(self, key: jax.Array, shardings: dict[str, NamedSharding]) -> Parameters:
    """Fresh parameters with these shardings, the same ones on every mesh; to be traced under jit."""
    draw = lambda key: split(Transformer(self.config, self.context, nnx.Rngs(params=key)))
    # Explicit axes would draw every parameter whole and cut it afterwards; Auto axes draw on each device its own part.
    return jax.sharding.auto_axes(draw, out_sharding=shardings)(key)

  def merge(self, parameters: Mapping[str, Weight]) -> Transformer:
    """The module with these values; free of cost inside a traced function."""
    flat = {path: variable.replace(parameters[name]) for name, (path, variable) in self.variables.items()}
    return nnx.merge(self.graph, nnx.from_flat_state(flat))


  def transposed(self) -> 'Blueprint':
    """The same model with kernels kept as [output, input], as products of few rows read them best: on a CPU 8 rows took 31 ms where
    they took 41. Its layers must be one by one."""
    def turned(name, variable):
      if not name.endswith('kernel'):
        return variable
      value, axes = variable.get_value(), variable.get_metadata('axes')
      return variable.replace(jax.ShapeDtypeStruct(value.shape[::-1], value.dtype), axes=axes[::-1], transposed=True)
    assert not self.config.scan
    return dataclasses.replace(self, variables={name: (path, turned(name, v)) for name, (path, v) in self.variables.items()})


def split(model: Transformer) -> Parameters:
  """The parameters of a module."""
  return {_name(path): variable[...] for path, variable in nnx.to_flat_state(nnx.split(model)[1])}


def blueprint(config: ModelConfig, context: int) -> Blueprint:
  """Describes the transformer of a config; nothing is computed or allocated."""
  return _blueprint(config, context, jax.sharding.get_abstract_mesh())


@functools.lru_cache(maxsize=64)  # a run asks some times, the search for a layout hundreds of times, and each takes 0.1 s
def _blueprint(config: ModelConfig, context: int, mesh: AnyMesh) -> Blueprint:
  """`mesh`: the one in force, which the traced types name."""
  graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, context, nnx.Rngs(params=0))))
  return Blueprint(config, context, graph, {_name(path): (path, v) for path, v in nnx.to_flat_state(state)})


def _kinds(names: list[str]) -> str:
  """Names of parameters, those of all layers as one."""
  return ', '.join(dict.fromkeys(re.sub(r'/\d+/', '/', name) for name in names))


def _name(path: tuple) -> str:
  return '/'.join(map(str, path))
