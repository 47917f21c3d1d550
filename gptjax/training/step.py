"""The train state and the one train step.

The flow of a step: `Zero.enter` hands the parameters to a shard_map (`batch_shard_map`), in which each device has its own rows;
there, for each microbatch, the model turns tokens into hidden states, the objective turns these into sums, and gradients of the summed
loss add up; `Zero.reduce` exchanges them once; outside of the shard_map the optimizer updates each device's part of the state.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from gptjax.config import LAYERS_AXIS, Config, PipelineConfig, UserError
from gptjax.model import AbstractModel, Parameters, Sums, load_metrics, positions_of
from gptjax.sharding import TOKENS_SPEC, AnyMesh, ParameterSpecs, Zero, batch_psum, batch_shard_map, make_schedule, row_numbers
from gptjax.training.guard import LossStatistics, initial_statistics, is_good_step
from gptjax.training.sums import Batch, ObjectiveFunction
from gptjax.training.optimizer import Rates, is_balance, update
from gptjax.training.pipeline import pipelined_gradients


_CONSTANTS = {'teacher_head'}
"""Entries of a batch that all rows share."""


class TrainState(NamedTuple):
  """Training state: parameters, optimizer state and statistics for the detection of bad steps."""

  step: jax.Array
  """steps taken, skipped ones included, int32"""
  trained: Parameters
  frozen: Parameters
  """parameters that the model reads and no step changes"""
  optimizer: Any
  """for the trained ones alone"""
  statistics: LossStatistics
  """of loss and gradient norm, for the detection of bad steps"""

  @property
  def parameters(self) -> dict[str, Any]:
    """All parameters of the model, abstract or device-local if the state is."""
    return {**self.trained, **self.frozen}


@functools.lru_cache(maxsize=16)  # cached, so that a second identical run in this process does not compile again
def initializer(model: AbstractModel, optimizer: optax.GradientTransformation, zero_stage: int, mesh: AnyMesh,
                seed: int, frozen: frozenset[str] = frozenset()) -> Callable[[], TrainState]:
  """A jitted function that makes the state of step 0, each part created where it belongs; `frozen`: names of parameters."""
  shardings, specs = model.shardings(zero_stage, mesh), model.specs(zero_stage, mesh)

  def initialize():
    parameters = model.initialize(jax.random.key(seed), shardings)
    kept = {name: parameters.pop(name) for name in sorted(frozen)}
    moments = optimizer.init(_put(parameters, specs, 'optimizer'))
    return TrainState(jnp.zeros((), jnp.int32), parameters, kept, moments, initial_statistics())

  return jax.jit(initialize)


def frozen_names(model: AbstractModel, config: Config) -> frozenset[str]:
  """Names of the parameters that match config.frozen, or with adapters all others; raises a UserError if a pattern matches none, or the
  patterns match all."""
  names = model.frozen(config.frozen)
  if len(names) == len(model.shapes):
    raise UserError('frozen', list(config.frozen), 'patterns that leave parameters to train')
  return names


def abstract(initialize: Callable[[], TrainState], mesh: AnyMesh) -> TrainState:
  """Shapes, dtypes and shardings of the state, with nothing allocated: the target of a restored checkpoint."""
  def describe(x):
    # eval_shape gives scalars no sharding of the mesh: they are replicated.
    sharding = x.sharding if isinstance(x.sharding, NamedSharding) and x.ndim else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, sharding.spec))
  return jax.tree.map(describe, jax.eval_shape(initialize))


def summed_gradients(model: AbstractModel, objective: ObjectiveFunction, zero_stage: int, mesh: AnyMesh,
                     microbatches: int, pipeline: PipelineConfig = PipelineConfig(), gradient_noise: bool = False,
                     ) -> Callable[[Parameters, Parameters, Batch, jax.Array], tuple[Parameters, dict[str, jax.Array]]]:
  """A function (trained, frozen, batch, key) -> (gradient of the summed loss, sums of targets and metrics), over all rows of the batch.

  The gradients are sharded as the optimizer state is. Dropout keys are folded from (key, row, layer), so that the masks depend neither
  on the mesh nor on the number of microbatches. With `gradient_noise` the sums have those of `_noise_sums`.
  """
  zero, stages = model.zero(zero_stage, mesh), mesh.shape[LAYERS_AXIS]

  def loss(variables, weights, batch, keys, objective):
    module = model.merge(weights | {name: weights[name].with_variable(variable) for name, variable in variables.items()})
    hidden, _, layers = module.hidden(batch['tokens'], positions_of(batch), keys=keys)
    sums = objective(module.head, hidden, batch)
    return sums.loss + layers.pop('loss', 0), sums.named | layers

  def local(trained, frozen, batch, key):
    weights = zero.weights(trained) | zero.weights(frozen, differentiated=False)
    variables = {name: weights[name].variable for name in trained}
    numbers = row_numbers(batch['tokens'].shape[0])
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(numbers) if model.config.dropout else None
    constants = {name: batch.pop(name) for name in _CONSTANTS & batch.keys()}
    complete = lambda head, hidden, rows: objective(head, hidden, rows | constants)

    if stages > 1:
      schedule = make_schedule(pipeline.schedule, stages, microbatches, pipeline.chunks)
      parts = _split(batch, microbatches), _split(keys, microbatches)
      gradient, sums = pipelined_gradients(model, complete, schedule, weights, sorted(trained), *parts)
      return zero.reduce(gradient), batch_psum(sums)

    def gradients(rows, keys):
      (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(variables, weights, rows, keys, complete)
      return gradient, sums | (_noise_sums(zero, gradient, sums) if gradient_noise else {})

    if microbatches == 1:
      gradient, sums = gradients(batch, keys)
    else:
      parts = _split((batch, keys), microbatches)
      add = lambda sums, part: (jax.tree.map(jnp.add, sums, gradients(*part)), None)
      zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding.spec if s.ndim else None),
                           jax.eval_shape(gradients, *jax.tree.map(lambda x: x[0], parts)))
      (gradient, sums), _ = jax.lax.scan(add, zeros, parts)
    return zero.reduce(gradient), batch_psum(sums)

  def summed(trained, frozen, batch, key):
    specs = lambda parameters: {name: zero.in_specs[name] for name in parameters}
    rows = {name: PartitionSpec() if name in _CONSTANTS else TOKENS_SPEC for name in batch}
    run = batch_shard_map(local, (specs(trained), specs(frozen), rows, PartitionSpec()), (zero.out_specs(trained), PartitionSpec()))
    gradient, sums = run(zero.enter(trained), zero.enter(frozen), batch, key)
    return zero.leave(gradient), sums

  return summed


def _noise_sums(zero: Zero, gradient: Parameters, sums: Sums) -> Sums:
  """What a part of the batch, which is a microbatch of the devices that sum its gradient at once, adds to the sums of `noise_estimates`."""
  terms = batch_psum(sums.get('terms', sums['targets']), zero.summed_axes)
  copies = math.prod(jax.lax.axis_size(name) for name in zero.summed_axes)  # all of these devices add it
  has_some = (terms > 0).astype(jnp.float32) / copies
  return {'parts': has_some, 'squares': has_some * zero.squared_norm(gradient) / jnp.where(terms > 0, terms, 1)}


def noise_estimates(parts: Float[Array, ''], squares: Float[Array, ''], norm: Float[Array, ''], terms: Float[Array, ''],
                    ) -> dict[str, Float[Array, '']]:
  """Unbiased estimates of |G|^2 and tr(S), for the mean G and the covariance S of the gradients of single terms (targets).

  The summed gradient s of a part with n terms has E|s|^2 = n^2 |G|^2 + n tr(S), and that of the complete batch likewise. For parts of
  equal size these are the estimates of McCandlish et al. (arXiv:1812.06162, appendix A.1). They are nan for less than two parts.

  Args:
    parts: number of parts that have terms.
    squares: sum of |s|^2 / n over them.
    norm, terms: norm of the batch's mean gradient, and its number of terms.
  """
  variance = (squares - terms * norm**2) / jnp.where(parts > 1, parts - 1, jnp.nan)
  return {'gradient_square': norm**2 - variance / terms, 'gradient_variance': variance}


def _split(rows: Any, microbatches: int) -> Any:
  return jax.tree.map(lambda x: x.reshape(microbatches, x.shape[0] // microbatches, *x.shape[1:]), rows)


@functools.lru_cache(maxsize=16)
def train_step(model: AbstractModel, objective: ObjectiveFunction, optimizer: optax.GradientTransformation,
               rates: Callable[[jax.Array], Rates],
               *, zero_stage: int, mesh: AnyMesh, microbatches: int, seed: int, spike: float = 0.0,
               pipeline: PipelineConfig = PipelineConfig(), gradient_noise: bool = False) -> Callable[[TrainState, Batch], tuple]:
  """The jitted step: (state, batch) -> (state, metrics), with the old state's memory reused.

  The gradient is that of the summed loss, divided by the number of target tokens (or terms) of the complete batch, regardless of
  microbatches and devices; `pipeline` is for several stages; `gradient_noise` adds `noise_estimates` to the metrics. A bad step, by
  `is_good_step`, or one without targets leaves parameters and optimizer state as they were, bit by bit.
  """
  specs = model.specs(zero_stage, mesh)
  gradients = summed_gradients(model, objective, zero_stage, mesh, microbatches, pipeline, gradient_noise)

  def step(state: TrainState, batch: Batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    gradient, sums = gradients(state.trained, state.frozen, batch, key)
    targets = sums.pop('targets')
    terms = sums.pop('terms', targets)
    empty = (terms == 0) | (targets == 0)
    divisor = jnp.where(empty, 1, terms)
    norm = optax.tree.norm({name: g for name, g in gradient.items() if not is_balance(name)}) / divisor
    gradient = {name: g * (1 / divisor) for name, g in gradient.items()}  # XLA would write g / divisor to memory
    parameters = _put(state.trained, specs, 'optimizer')
    noise = noise_estimates(sums.pop('parts'), sums.pop('squares'), norm, divisor) if gradient_noise else {}
    load = load_metrics(sums.pop('load')) if 'load' in sums else {}
    metrics = load | noise | {name: value / divisor for name, value in sums.items()}
    metrics |= {'grad_norm': norm, **(now := rates(state.step)), 'targets': targets}
    good, statistics = is_good_step(state.statistics, metrics['loss'], norm, spike)
    statistics = optax.tree.where(empty, state.statistics, statistics)
    parameters, moments = update(optimizer, gradient, norm, good & ~empty, now, state.optimizer, parameters)
    new = TrainState(state.step + 1, _put(parameters, specs, 'stored'), state.frozen, moments, statistics)
    return new, metrics | {'bad': ~(good | empty)}

  return jax.jit(step, donate_argnums=0)


def _put(arrays: Mapping[str, jax.Array], specs: Mapping[str, ParameterSpecs], role: str) -> dict[str, jax.Array]:
  return {name: jax.reshard(x, getattr(specs[name], role)) for name, x in arrays.items()}


def state_bytes(model: AbstractModel, optimizer: optax.GradientTransformation, zero_stage: int, mesh: AnyMesh,
                frozen: frozenset[str] = frozenset()) -> dict[str, int]:
  """Bytes that a device holds of parameters, gradients and optimizer state, by the shapes of its shards; nothing is allocated."""
  state = abstract(initializer(model, optimizer, zero_stage, mesh, 0, frozen), mesh)
  specs, dtypes = model.specs(zero_stage, mesh), model.dtypes
  held = lambda leaves: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
  at = lambda name, spec, dtype: jax.ShapeDtypeStruct(model.shapes[name].shape, dtype, sharding=NamedSharding(mesh, spec))
  found = {
    'parameters': held(state.parameters.values()),
    'gradients': held(at(name, spec.gradient, 'float32') for name, spec in specs.items() if name not in frozen),
    'optimizer': held(jax.tree.leaves(state.optimizer)),
  }
  if zero_stage in (1, 2):  # parameters that are stored sharded and gathered for the step
    found['gathered'] = held(at(name, spec.compute, dtypes[name]) for name, spec in specs.items() if spec.stored != spec.compute)
  return found
