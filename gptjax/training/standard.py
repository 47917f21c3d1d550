"""The standard layout of a train state, in which checkpoints hold it and evaluation reads it: layers in order, and a mesh without axes for
layers, experts or tokens. So a run goes on, and is evaluated, on any other mesh."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint import by_name
from gptjax.config import Config
from gptjax.model import AbstractModel, Parameters, model_of, stored_model
from gptjax.sharding import folded, gathered, unfolded, viewed
from gptjax.training.step import TrainState, abstract, frozen_names, initializer


class Standard:
  """Converts train states and parameters between a run's layout and the standard one.

  Args:
    config, mesh, optimizer: of the run.
  """

  def __init__(self, config: Config, mesh: Mesh, optimizer: optax.GradientTransformation):
    self._config, self._run_mesh, self._run_model, self._optimizer = config, mesh, model_of(config), optimizer
    self.mesh, self.model = folded(mesh), stored_model(config)
    self.zero_stage = config.zero_stage if self.mesh == mesh else 3
    """at which arrays are sharded over `mesh`"""
    self.is_in_order = self._run_model.slots in ((), tuple(range(config.model.layers)))
    """whether the run's layers are"""

  def abstract_state(self, model: AbstractModel) -> TrainState:
    """The saved state of a model in the standard layout: shapes, dtypes and shardings."""
    with jax.set_mesh(self.mesh):
      frozen = frozen_names(model, self._config)
      return self._saved(abstract(initializer(model, self._optimizer, self.zero_stage, self.mesh, 0, frozen), self.mesh))

  def parameters(self, parameters: Parameters) -> Parameters:
    """Parameters of the run for forward passes of `model` on `mesh`."""
    return parameters if self.mesh == self._run_mesh else {
      name: viewed(x, self.mesh, self._shardings[name].spec) for name, x in self._leave_for_parameters(parameters).items()}

  def saved(self, state: TrainState) -> TrainState:
    """A state as checkpoints hold it: the same arrays if the run's layers are in order; of a run with adapters without the base."""
    return self._saved(state) if self.is_in_order else self._leave_for_state(self._saved(state))

  def _saved(self, state: TrainState) -> TrainState:
    return state._replace(frozen={}) if self._config.lora.rank else state

  def enter(self, arrays: Mapping[str, jax.Array], wanted: Any) -> Any:
    """The tree `wanted` of the run's shapes and shardings, from arrays by name in the standard layout."""
    @jax.jit
    def convert(arrays):
      found = self._run_model.in_layout({name: _gathered(x) for name, x in arrays.items()})
      return [_placed(found[name], x.sharding.spec) for name, x in by_name(wanted).items()]

    here = {name: viewed(x, self._run_mesh, unfolded(x.sharding.spec)) for name, x in arrays.items()}  # type: ignore[attr-defined]
    return jax.tree.unflatten(jax.tree.structure(wanted), convert(here))

  @functools.cached_property
  def _shardings(self) -> dict[str, NamedSharding]:
    return self.model.shardings(self.zero_stage, self.mesh)

  @functools.cached_property
  def _leave_for_parameters(self):
    return self._leave(self._shardings)

  @functools.cached_property
  def _leave_for_state(self):
    return self._leave(jax.tree.map(lambda x: x.sharding, self.abstract_state(self.model)))

  def _leave(self, shardings: Any):
    places = np.argsort(self._run_model.slots)[-self.model.config.layers:]  # places without a layer come first

    def one(name: str, x: jax.Array, spec: PartitionSpec) -> jax.Array:
      x = _gathered(x)
      x = x if self.is_in_order or '/blocks/' not in f'/{name}' else x[places]
      return _placed(x, unfolded(spec))

    specs = [sharding.spec for sharding in jax.tree.leaves(shardings)]
    return jax.jit(lambda tree: jax.tree.unflatten(jax.tree.structure(tree), [
      one(name, x, spec) for (name, x), spec in zip(by_name(tree).items(), specs, strict=True)]))


def _gathered(x: jax.Array) -> jax.Array:
  return jax.reshard(x, gathered(jax.typeof(x).sharding.spec))


def _placed(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  # In two steps, an exchange and a slice: XLA would replicate the array over all devices to do both at once.
  return jax.reshard(jax.reshard(x, gathered(spec)), spec)
