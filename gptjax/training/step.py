"""The train state and the one train step."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.model import Blueprint, Copy, Parameters
from gptjax.sharding import AnyMesh, Places
from gptjax.training.guard import Watch, fresh_watch, judge
from gptjax.training.objective import Batch, Objective
from gptjax.training.optimizer import update


class TrainState(NamedTuple):
  """All that changes from step to step on the devices."""

  step: jax.Array
  """updates done, int32"""
  parameters: Parameters
  optimizer: Any
  watch: Watch
  """of loss and gradient norm, by which a bad step is known"""


def initializer(blueprint: Blueprint, optimizer: optax.GradientTransformation, zero_stage: int, mesh: AnyMesh,
                seed: int) -> Callable[[], TrainState]:
  """A jitted function that makes the state of step 0, each part created where it belongs."""
  shardings, places = blueprint.shardings(zero_stage, mesh), blueprint.places(zero_stage, mesh)

  def initialize():
    parameters = blueprint.initialize(jax.random.key(seed), shardings)
    moments = optimizer.init(_put(parameters, places, 'optimizer'))
    return TrainState(jnp.zeros((), jnp.int32), parameters, moments, fresh_watch())

  return jax.jit(initialize)


def abstract(initialize: Callable[[], TrainState], mesh: AnyMesh) -> TrainState:
  """Shapes, dtypes and shardings of the state, with nothing allocated; what a checkpoint is restored into."""
  def describe(x):
    # eval_shape gives scalars no sharding of the mesh: they are replicated.
    sharding = x.sharding if isinstance(x.sharding, NamedSharding) and x.ndim else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, sharding.spec))
  return jax.tree.map(describe, jax.eval_shape(initialize))


def train_step(blueprint: Blueprint, objective: Objective, optimizer: optax.GradientTransformation, rate: optax.Schedule,
               *, zero_stage: int, mesh: AnyMesh, microbatches: int, seed: int, spike: float = 0.0) -> Callable[[TrainState, Batch], tuple]:
  """The jitted step: (state, batch) -> (state, metrics), with the old state's memory reused.

  The gradient is that of the summed loss over the count of targets of the whole batch, however it is cut into microbatches
  and spread over devices. Dropout keys are folded from (seed, step, microbatch, layer). A bad step, by `judge`, leaves parameters and
  optimizer state as they were, bit by bit.

  What ZeRO (arXiv:1910.02054) shares out over `data` are the places of parameters, gradients and optimizer state, and the
  exchanges follow: from its place each parameter is gathered (stage 3 layer by layer where it is read, others once a step, after
  the update or before it), each gradient is summed into its own place, and the update runs where the optimizer state lies.
  """
  with_dropout = blueprint.config.dropout > 0
  places = blueprint.places(zero_stage, mesh)
  # A gradient has the type of what it is taken with respect to; where it lies elsewhere than what is read, that is a Copy's zeros.
  apart = zero_stage in (1, 2)

  def differentiated(parameters):
    if not apart:
      return parameters
    return {name: jnp.zeros(p.shape, p.dtype, out_sharding=places[name].gradient) for name, p in parameters.items()}

  def copies(parameters):
    if not apart:
      return None
    return {name: jax.reshard(p.astype(blueprint.dtypes[name]), places[name].compute) for name, p in parameters.items()}

  def gradients(at, copies, batch, key):
    def total(at):
      weights = {name: Copy(copies[name], at[name]) for name in at} if apart else at
      loss, count, metrics = objective(blueprint.merge(weights), batch, key)
      return loss, {'targets': count, **metrics}
    (_, sums), gradient = jax.value_and_grad(total, has_aux=True)(at)
    return gradient, sums

  def accumulate(parameters, batch, key):
    fold = lambda index: jax.random.fold_in(key, index) if with_dropout else None
    inputs = differentiated(parameters), copies(parameters)
    if microbatches == 1:
      return gradients(*inputs, batch, fold(0))
    # Cutting [B, T] as (B/n, n) keeps every row on its device; (n, B/n) would move it.
    cut = lambda x: jnp.swapaxes(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 0, 1)
    def add(carry, part):
      index, rows = part
      return jax.tree.map(jnp.add, carry, gradients(*inputs, rows, fold(index))), None
    parts = (jnp.arange(microbatches), jax.tree.map(cut, batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec if s.ndim else None),
                         jax.eval_shape(gradients, *inputs, jax.tree.map(lambda x: x[0], parts[1]), fold(0)))
    return jax.lax.scan(add, zeros, parts)[0]

  def step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradient, sums = accumulate(state.parameters, batch, key)
    targets = sums.pop('targets')
    gradient = _put({name: g * (1 / targets) for name, g in gradient.items()}, places, 'optimizer')
    parameters = _put(state.parameters, places, 'optimizer')
    metrics = {name: value / targets for name, value in sums.items()}
    metrics |= {'grad_norm': optax.global_norm(gradient), 'learning_rate': rate(state.step), 'targets': targets}
    good, watch = judge(state.watch, metrics['loss'], metrics['grad_norm'], spike)
    parameters, moments = update(optimizer, gradient, state.optimizer, parameters, good)
    return TrainState(state.step + 1, _put(parameters, places, 'stored'), moments, watch), metrics | {'bad': ~good}

  return jax.jit(step, donate_argnums=0)


def _put(arrays: Mapping[str, jax.Array], places: Mapping[str, Places], role: str) -> dict[str, jax.Array]:
  return {name: jax.reshard(x, getattr(places[name], role)) for name, x in arrays.items()}


def state_bytes(blueprint: Blueprint, optimizer: optax.GradientTransformation, zero_stage: int, mesh: AnyMesh) -> dict[str, int]:
  """Bytes that a device holds of parameters, gradients and optimizer state, by the shapes of its shards; nothing is allocated."""
  state = abstract(initializer(blueprint, optimizer, zero_stage, mesh, 0), mesh)
  places, dtypes = blueprint.places(zero_stage, mesh), blueprint.dtypes
  held = lambda leaves: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
  at = lambda name, place, dtype: jax.ShapeDtypeStruct(blueprint.shapes[name].shape, dtype, sharding=NamedSharding(mesh, place))
  found = {
    'parameters': held(state.parameters.values()),
    'gradients': held(at(name, place.gradient, 'float32') for name, place in places.items()),
    'optimizer': held(jax.tree.leaves(state.optimizer)),
  }
  if zero_stage in (1, 2):  # what is gathered for the whole step, where that is not what is stored
    found['copies'] = held(at(name, place.compute, dtypes[name]) for name, place in places.items() if place.stored != place.compute)
  return found
