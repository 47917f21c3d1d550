"""The train state and the one train step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.model import Blueprint, Parameters
from gptjax.sharding import AnyMesh
from gptjax.training.objective import Batch, Objective


class TrainState(NamedTuple):
  """All that changes from step to step on the devices."""

  step: jax.Array
  """updates done, int32"""
  parameters: Parameters
  optimizer: Any


def initializer(blueprint: Blueprint, optimizer: optax.GradientTransformation, zero_stage: int, mesh: AnyMesh,
                seed: int) -> Callable[[], TrainState]:
  """A jitted function that makes the state of step 0, each part created where it belongs."""
  shardings = blueprint.shardings(zero_stage, mesh)

  def initialize():
    parameters = blueprint.initialize(jax.random.key(seed), shardings)
    return TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))

  return jax.jit(initialize)


def abstract(initialize: Callable[[], TrainState], mesh: AnyMesh) -> TrainState:
  """Shapes, dtypes and shardings of the state, with nothing allocated; what a checkpoint is restored into."""
  def describe(x):
    # eval_shape gives scalars no sharding of the mesh: they are replicated.
    sharding = x.sharding if isinstance(x.sharding, NamedSharding) and x.ndim else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, sharding.spec))
  return jax.tree.map(describe, jax.eval_shape(initialize))


def train_step(blueprint: Blueprint, objective: Objective, optimizer: optax.GradientTransformation,
               rate: optax.Schedule, *, microbatches: int, seed: int) -> Callable[[TrainState, Batch], tuple]:
  """The jitted step: (state, batch) -> (state, metrics), with the old state's memory reused.

  The gradient is that of the summed loss over the count of targets of the whole batch, however it is cut into microbatches
  and spread over devices. Dropout keys are folded from (seed, step, microbatch, layer).
  """
  with_dropout = blueprint.config.dropout > 0

  def gradients(parameters, batch, key):
    def total(parameters):
      loss, count, metrics = objective(blueprint.merge(parameters), batch, key)
      return loss, {'targets': count, **metrics}
    (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(parameters)
    return gradient, sums

  def accumulate(parameters, batch, key):
    fold = lambda index: jax.random.fold_in(key, index) if with_dropout else None
    if microbatches == 1:
      return gradients(parameters, batch, fold(0))
    # Cutting [B, T] as (B/n, n) keeps every row on its device; (n, B/n) would move it.
    cut = lambda x: jnp.swapaxes(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 0, 1)
    def add(carry, inputs):
      index, part = inputs
      return jax.tree.map(jnp.add, carry, gradients(parameters, part, fold(index))), None
    parts = (jnp.arange(microbatches), jax.tree.map(cut, batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec if s.ndim else None),
                         jax.eval_shape(gradients, parameters, jax.tree.map(lambda x: x[0], parts[1]), fold(0)))
    return jax.lax.scan(add, zeros, parts)[0]

  def step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradient, sums = accumulate(state.parameters, batch, key)
    targets = sums.pop('targets')
    gradient = jax.tree.map(lambda g: g / targets, gradient)
    updates, moments = optimizer.update(gradient, state.optimizer, state.parameters)
    metrics = {name: value / targets for name, value in sums.items()}
    metrics |= {'grad_norm': optax.global_norm(gradient), 'learning_rate': rate(state.step), 'targets': targets}
    new = TrainState(state.step + 1, optax.apply_updates(state.parameters, updates), moments)
    return new, metrics

  return jax.jit(step, donate_argnums=0)
