"""A model's parameters as plain data: one flat dict from 'blocks/0/attention/q/kernel' to an array."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from gptjax.config import ModelConfig
from gptjax.model.transformer import Transformer
from gptjax.sharding import AnyMesh, stored_spec

Parameters = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Blueprint:
  """A transformer without its values: what initialisation, checkpoints, optimizer and counters are all derived from."""

  config: ModelConfig
  context: int
  graph: Any
  variables: dict[str, tuple[tuple, nnx.Param]]

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter."""
    return {name: jax.ShapeDtypeStruct(v.get_value().shape, v.get_value().dtype) for name, (_, v) in self.variables.items()}

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """Logical axes of every parameter."""
    return {name: v.get_metadata('axes') for name, (_, v) in self.variables.items()}

  def shardings(self, zero_stage: int, mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Where every parameter lies between steps."""
    return {name: NamedSharding(mesh, stored_spec(self.axes[name], shape.shape, zero_stage, mesh))
            for name, shape in self.shapes.items()}

  def initialize(self, key: jax.Array, shardings: dict[str, NamedSharding]) -> Parameters:
    """Fresh parameters with these shardings, the same ones on every mesh; to be traced under jit."""
    draw = lambda key: split(Transformer(self.config, self.context, nnx.Rngs(params=key)))
    # Explicit axes would draw every parameter whole and cut it afterwards; Auto axes draw on each device its own part.
    return jax.sharding.auto_axes(draw, out_sharding=shardings)(key)

  def merge(self, parameters: Parameters) -> Transformer:
    """The module with these values; free of cost inside a traced function."""
    flat = {path: variable.replace(parameters[name]) for name, (path, variable) in self.variables.items()}
    return nnx.merge(self.graph, nnx.from_flat_state(flat))


def split(model: Transformer) -> Parameters:
  """The parameters of a module."""
  return {_name(path): variable[...] for path, variable in nnx.to_flat_state(nnx.split(model)[1])}


def blueprint(config: ModelConfig, context: int) -> Blueprint:
  """Describes the transformer of a config; nothing is computed or allocated."""
  graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, context, nnx.Rngs(params=0))))
  return Blueprint(config, context, graph, {_name(path): (path, v) for path, v in nnx.to_flat_state(state)})


def _name(path: tuple) -> str:
  return '/'.join(map(str, path))
