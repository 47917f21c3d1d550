"""Gradients by pipeline stages: one executor that runs any schedule, inside the shard_map of a step.

All stages run the same program, a scan over ticks: each looks up its operation in the schedule's table, runs it, and passes activations to
the next stage and gradients to the previous one. F keeps what `jax.vjp` of its layers keeps, by the remat policy. B calls that vjp and
keeps the factors of the gradients of matrices; W multiplies them. So nothing is computed twice, in whatever order.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gptjax.config import LAYERS_AXIS
from gptjax.model import AbstractModel, Parameters, Sums, positions_of
from gptjax.sharding import Factors, Places, Schedule, Tick, Weight, assign_places, spec
from gptjax.training.sums import Batch, ObjectiveFunction


class _State(NamedTuple):
  """What a stage has between ticks."""

  memories: list[jax.Array]
  """kept arrays, those of a kind stacked"""
  activations: jax.Array
  gradients: jax.Array
  """arrivals"""
  gradient: Parameters
  """of the summed loss with respect to the variables, so far"""
  sums: Sums


def pipelined_gradients(model: AbstractModel, objective: ObjectiveFunction, schedule: Schedule, weights: Mapping[str, Weight],
                        trained: list[str], batch: Batch, keys: jax.Array | None) -> tuple[Parameters, Sums]:
  """Gradients of the summed loss with respect to the variables of this stage's weights, and the sums of targets and metrics, not yet summed
  over devices.

  Args:
    weights: of all parameters; of stacked ones the part of this stage.
    trained: names of parameters to differentiate with respect to.
    batch, keys: [microbatches, rows, ...]; `keys` are for dropout, one per row.
  """
  stage = _Stage(model, objective, schedule, weights, trained, batch, keys)
  places = assign_places(schedule, *stage.kinds)
  mine = jax.tree.map(lambda column: jnp.asarray(column)[:, jax.lax.axis_index(LAYERS_AXIS)], places.ticks)
  end, _ = jax.lax.scan(lambda state, tick: (stage.tick(state, tick), None), stage.begin(places), mine)
  return end.gradient, end.sums


class _Stage:
  """The operations of this device's stage."""

  def __init__(self, model: AbstractModel, objective: ObjectiveFunction, schedule: Schedule, weights: Mapping[str, Weight],
               trained: list[str], batch: Batch, keys: jax.Array | None):
    self._model, self._objective, self._schedule, self._batch, self._keys = model, objective, schedule, batch, keys
    self._inner = {name: weights[name] for name in weights if 'layers' in model.axes[name]}
    self._outer = {name: weights[name] for name in weights if name not in self._inner}
    self._matrices = sorted(name for name in trained if name in self._inner and model.is_matrix(name))
    self._vectors = sorted(name for name in trained if name in self._inner and name not in self._matrices)
    self._ends = sorted(name for name in trained if name in self._outer)
    self._variables = {name: weights[name].variable for name in trained}
    numbers = np.reshape(model.slots, (schedule.stages, schedule.chunks, -1))
    self._places = numbers.shape[2]
    self._numbers = jnp.asarray(numbers)[jax.lax.axis_index(LAYERS_AXIS)]
    tokens = batch['tokens'].shape[1] * batch['tokens'].shape[2]
    self._hidden = jax.eval_shape(lambda: self._embed({}, 0))

    def factors(name: str) -> Factors:
      shape, split = model.shapes[name].shape[1:], spec(*model.axes[name][1:])
      a, b = (jnp.zeros((self._places, tokens, size), model.dtypes[name], out_sharding=PartitionSpec(None, None, axis))
              for size, axis in zip(shape, split, strict=True))
      return Factors(a if self._readers[model.input_of(name)] == name else None, b)

    self._readers = {model.input_of(name): name for name in self._matrices}  # one of several that read the same array
    self._factors = {name: factors(name) for name in self._matrices}
    _, sums, _ = jax.eval_shape(lambda: self._forward(_zeros(self._hidden), 0, 0))
    self._sums = jax.eval_shape(lambda: self._loss({}, _zeros(self._hidden), 0)[1]) | sums
    self._kinds: list[Any] = []
    self.kinds = [[self._kind(x) for x in self._kept], [self._kind(jax.typeof(x)) for x in jax.tree.leaves(self._factors)]]
    """of the arrays that F and B keep: those of equal shape, dtype and sharding have the same number"""

  def begin(self, places: Places) -> _State:
    """The state before the first tick."""
    return _State([_zeros(x, count) for x, count in zip(self._kinds, places.kept, strict=True)],
                  _zeros(self._hidden, places.activations), _zeros(self._hidden, places.gradients),
                  {name: _zeros(x) for name, x in jax.eval_shape(lambda: self._variables).items()}, jax.tree.map(_zeros, self._sums))

  def tick(self, state: _State, tick: Tick) -> _State:
    """Runs one operation, sends what it hands on, and stores what arrives."""
    nothing = _zeros(self._hidden)
    state, up, down = jax.lax.switch(tick.operation, [
      lambda state, tick: (state, nothing, nothing), self._run_forward, self._run_backward, self._run_weights], state, tick)
    count = self._schedule.stages
    gradients = state.gradients.at[tick.store_output].set(up)
    up = jax.lax.ppermute(up, LAYERS_AXIS, [(stage, (stage + 1) % count) for stage in range(count)])
    down = jax.lax.ppermute(down, LAYERS_AXIS, [(stage, (stage - 1) % count) for stage in range(count)])
    return state._replace(activations=state.activations.at[tick.store_activation].set(up),
                          gradients=gradients.at[tick.store_gradient].set(down))

  def _run_forward(self, state: _State, tick: Tick):
    x = jax.lax.cond(self._virtual(tick) == 0, lambda: self._embed({}, tick.microbatch), lambda: state.activations[tick.read])
    y, sums, kept = self._forward(x, tick.microbatch, tick.chunk)
    state = self._store(state, 0, tick.kept, kept)
    return state._replace(sums=state.sums | {name: state.sums[name] + value for name, value in sums.items()}), y, jnp.zeros_like(y)

  def _run_backward(self, state: _State, tick: Tick):
    arrived = state.gradients[tick.read]

    def loss(ends, sums):
      (_, added), (gradient, dy) = jax.value_and_grad(self._loss, (0, 1), has_aux=True)(self._of(self._ends), arrived, tick.microbatch)
      return _sum(ends, gradient), sums | {name: sums[name] + value for name, value in added.items()}, dy

    def embed(ends, dx):
      return _sum(ends, jax.vjp(lambda variables: self._embed(variables, tick.microbatch), self._of(self._ends))[1](dx)[0])

    ends, last = {name: state.gradient[name] for name in self._ends}, self._schedule.stages * self._schedule.chunks - 1
    ends, sums, dy = jax.lax.cond(self._virtual(tick) == last, loss, lambda ends, sums: (ends, sums, arrived), ends, state.sums)
    vectors, factors, dx = self._vjp(self._load(state, 0, tick.kept), tick)((dy, jnp.float32(1)))
    ends = jax.lax.cond(self._virtual(tick) == 0, embed, lambda ends, dx: ends, ends, dx)
    state = self._store(state, 1, tick.factors, jax.tree.leaves(factors))
    state = state._replace(gradient=state.gradient | ends, sums=sums)
    return self._add(state, vectors, tick.chunk), jnp.zeros_like(dx), dx

  def _run_weights(self, state: _State, tick: Tick):
    factors = jax.tree.unflatten(jax.tree.structure(self._factors), self._load(state, 1, tick.factors))

    def gradient(name: str):
      a = factors[self._readers[self._model.input_of(name)]].a
      product = jnp.einsum('lna,lnb->lab', a, factors[name].b, preferred_element_type=jnp.float32,
                           out_sharding=PartitionSpec(None, *spec(*self._model.axes[name][1:])))
      return self._chunk(self._inner[name], tick.chunk).cotangent(product).variable
    nothing = _zeros(self._hidden)
    return self._add(state, {name: gradient(name) for name in self._matrices}, tick.chunk), nothing, nothing

  def _embed(self, variables: Parameters, microbatch):
    module, part = self._module(self._outer, variables), self._part(microbatch)
    return module.embed(part[0]['tokens'], *part[1:])

  def _loss(self, variables: Parameters, y, microbatch):
    module, batch = self._module(self._outer, variables), self._part(microbatch)[0]
    sums = self._objective(module.head, module.norm(y), batch)
    return sums.loss, sums.named

  def _forward(self, x, microbatch, chunk):
    """The output of a chunk of layers, the sums that they add, and what must be kept for the vjp."""
    fixed = self._fixed(microbatch, chunk)

    def layers(vectors, factors, x):
      weights, numbers, *rest = fixed
      weights = weights | {name: weights[name].with_variable(value) for name, value in vectors.items()}
      weights = weights | {name: dataclasses.replace(weights[name], factors=value) for name, value in factors.items()}
      y, sums = self._module(weights, {}).stacked_layers(x, numbers, *rest)
      return (y, jnp.asarray(sums.pop('loss', 0), jnp.float32)), sums

    inputs = self._differentiated(fixed)
    (y, _), vjp, sums = jax.vjp(layers, *inputs, x, has_aux=True)
    leaves, self._tree = jax.tree.flatten(vjp)
    known = jax.tree.leaves((inputs, fixed))
    self._sources = [next((index for index, one in enumerate(known) if one is leaf), None) for leaf in leaves]
    kept = [leaf for leaf, source in zip(leaves, self._sources, strict=True) if source is None]
    self._keyed = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in kept]
    kept = [jax.random.key_data(leaf) if keyed else leaf for leaf, keyed in zip(kept, self._keyed, strict=True)]
    self._kept = list(map(jax.typeof, kept))
    return y, sums, kept

  def _vjp(self, kept: Sequence[jax.Array], tick: Tick):
    """The vjp of layers from what `_forward` kept of it; the rest are weights and inputs of this microbatch, which are at hand."""
    fixed = self._fixed(tick.microbatch, tick.chunk)
    rest = iter(jax.random.wrap_key_data(x) if keyed else x for x, keyed in zip(kept, self._keyed, strict=True))
    known = jax.tree.leaves((self._differentiated(fixed), fixed))
    return jax.tree.unflatten(self._tree, [next(rest) if source is None else known[source] for source in self._sources])

  def _fixed(self, microbatch, chunk):
    """What layers read besides the residual stream: their weights and numbers, positions, keys for dropout."""
    return ({name: self._chunk(weight, chunk) for name, weight in self._inner.items()}, self._numbers[chunk], *self._part(microbatch)[1:])

  def _differentiated(self, fixed):
    return {name: fixed[0][name].variable for name in self._vectors}, self._factors

  def _part(self, microbatch):
    """The rows of a microbatch, their positions and keys."""
    batch, keys = jax.tree.map(lambda x: x[microbatch], (self._batch, self._keys))
    return batch, positions_of(batch), keys

  def _module(self, weights, variables: Parameters):
    return self._model.merge(self._inner | self._outer | weights | {
      name: weights[name].with_variable(variable) for name, variable in variables.items()})

  def _of(self, names: Iterable[str]) -> Parameters:
    return {name: self._variables[name] for name in names}

  def _chunk(self, stacked: Any, chunk):
    """The part of stacked arrays that belongs to a chunk of layers."""
    if self._schedule.chunks == 1:
      return stacked
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, chunk * self._places, self._places), stacked)

  def _add(self, state: _State, gradient: Parameters, chunk) -> _State:
    def added(total, part):
      if self._schedule.chunks == 1:
        return total + part
      return jax.lax.dynamic_update_slice_in_dim(total, self._chunk(total, chunk) + part, chunk * self._places, 0)
    return state._replace(gradient=state.gradient | {name: added(state.gradient[name], part) for name, part in gradient.items()})

  def _virtual(self, tick: Tick):
    return tick.chunk * self._schedule.stages + jax.lax.axis_index(LAYERS_AXIS)

  def _kind(self, x: Any) -> int:
    same = lambda other: (other.shape, other.dtype, _spec(other)) == (x.shape, x.dtype, _spec(x))
    if not any(map(same, self._kinds)):
      self._kinds.append(x)
    return next(kind for kind, other in enumerate(self._kinds) if same(other))

  def _store(self, state: _State, which: int, places: jax.Array, arrays: Sequence[jax.Array]) -> _State:
    memories = list(state.memories)
    for index, (kind, array) in enumerate(zip(self.kinds[which], arrays, strict=True)):
      memories[kind] = memories[kind].at[places[index]].set(array)
    return state._replace(memories=memories)

  def _load(self, state: _State, which: int, places: jax.Array) -> list[jax.Array]:
    return [state.memories[kind][places[index]] for index, kind in enumerate(self.kinds[which])]


def _spec(x: Any) -> PartitionSpec:
  return x.sharding.spec if x.ndim else PartitionSpec()


def _zeros(x: Any, count: int = 0) -> jax.Array:
  """Zeros of a shape, with its dtype and sharding, or a stack of them."""
  if count:
    return jnp.zeros((count, *x.shape), x.dtype, out_sharding=PartitionSpec(None, *_spec(x)))
  return jnp.zeros(x.shape, x.dtype, out_sharding=_spec(x))


def _sum(a: Parameters, b: Parameters) -> Parameters:
  return jax.tree.map(jnp.add, a, b)
