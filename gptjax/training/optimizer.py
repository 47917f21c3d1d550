"""Learning rate, optimizers and their update: AdamW, Muon and Lion from optax, applied by the role of each parameter."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from optax import contrib

from gptjax.config import TENSOR_AXIS, STATE_AXIS, OptimizerConfig, entry

SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
  'constant': jnp.ones_like,
  'cosine': lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
  'linear': lambda done: 1 - done,
  'wsd': lambda done: 1 - done,
}
"""Learning rate between its final value (0) and its peak (1), by the fraction of the decay that is done; by name in config.schedule."""


Rates = dict[str, jax.Array]
"""Learning rates of one step by name: learning_rate is adamw's and lion's, muon_learning_rate muon's."""


@functools.lru_cache(maxsize=16)
def learning_rates(config: OptimizerConfig, **durations: int) -> Callable[[jax.Array], Rates]:
  """The learning rates of each step, which it applies and reports; a function of the steps taken before it, bad ones included."""
  peaks = {'learning_rate': config.peak_lr} | ({'muon_learning_rate': config.muon_lr} if config.name == 'muon' else {})
  rates = {name: schedule(config, peak, **durations) for name, peak in peaks.items()}
  return lambda count: {name: rate(count) for name, rate in rates.items()}


def schedule(config: OptimizerConfig, peak: float, *, steps: int, warmup: int, decay: int) -> optax.Schedule:
  """The learning rate of each step, a function of the steps taken before it.

  It rises linearly over `warmup` steps, reaches `peak` at the next, and falls by config.schedule towards
  peak * final_fraction at `steps`; wsd (arXiv:2405.18392) only over the last `decay` steps.
  """
  shape, low = SCHEDULES[config.schedule], config.final_fraction

  def rate(count):
    count = jnp.asarray(count, jnp.float32)
    start = steps - decay if config.schedule == 'wsd' else warmup
    done = jnp.clip((count - start) / max(steps - start, 1), 0, 1)
    return peak * jnp.minimum((count + 1) / (warmup + 1), 1) * (low + (1 - low) * shape(done))

  return rate


def has_weight_decay(name: str) -> bool:
  """Whether weight decay applies: to matrices and embedding tables, never to biases and gains."""
  return name.endswith(('kernel', 'table', 'lora_a', 'lora_b'))


def uses_muon(name: str) -> bool:
  """Whether Muon handles a parameter: the matrices inside blocks; embeddings, head, biases and gains stay with AdamW."""
  return name.startswith('blocks/') and name.endswith('kernel')


def follows_width(name: str) -> bool:
  """Whether the rate of AdamW or Lion for a parameter falls as the width grows by muP: of the matrices inside blocks, as their inputs grow,
  and of the final norm, whose gains scale the logits; embeddings, head, biases and other gains keep theirs (arXiv:2203.03466, table 8)."""
  return uses_muon(name) or name.startswith('norm/')


def is_balance(name: str) -> bool:
  """Whether a parameter is the bias of a router, whose gradient is the excess of each expert's load: it counts in no norm."""
  return name.endswith('mlp/balance')


def make_optimizer(config: OptimizerConfig, width_ratio: float = 1.0) -> optax.GradientTransformation:
  """Clipping by global norm (arXiv:1211.5063), then the optimizer of the config, for `update`; `width_ratio`: that of the ModelConfig.

  Raises a UserError if there is no optimizer of this name.
  """
  return _clipped(entry(OPTIMIZERS, 'optimizer.name', config.name), config, width_ratio)


@functools.lru_cache(maxsize=16)
def _clipped(make: Callable, config: OptimizerConfig, width_ratio: float) -> optax.GradientTransformation:
  clip = _clip_by_global_norm(config.clip) if config.clip else optax.identity()  # a resumed run may switch it
  return _balancing(optax.named_chain(('clip', clip), ('update', make(config, width_ratio))), config.balance_rate)


def _balancing(optimizer: optax.GradientTransformation, rate: float) -> optax.GradientTransformationExtraArgs:
  """An optimizer that moves biases of routers by the sign of their gradients alone, at a constant rate (arXiv:2408.15664, algorithm 1)."""
  def update(updates, state, parameters=None, **more):
    signs = {name: -rate * jnp.sign(g) for name, g in updates.items() if is_balance(name)}
    updates, state = optimizer.update(updates, state, parameters, **more)
    return {**updates, **signs}, state

  optimizer = optax.with_extra_args_support(optimizer)
  return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _adamw(config: OptimizerConfig, width_ratio: float) -> optax.GradientTransformation:
  return _by_element(('adam', _scale_by_adam(config.b1, config.b2, config.eps)), config, width_ratio)


def _by_element(direction: tuple[str, optax.GradientTransformation], config: OptimizerConfig, width_ratio: float):
  """An optimizer whose direction has elements of about 1, whatever the gradient's size, so that it follows muP as Adam does."""
  def by_width(updates, _):
    return {name: jax.tree.map(lambda x: x / width_ratio, update) if follows_width(name) else update for name, update in updates.items()}

  # Names of links become parts of the names of a checkpoint's arrays.
  return optax.named_chain(
    direction,
    ('width', optax.stateless(by_width)),  # before the decay, whose strength shall not depend on the width (arXiv:2510.19093)
    ('decay', optax.add_decayed_weights(config.weight_decay, _by_name(has_weight_decay))),
    ('rate', scale_by_rate('learning_rate')))


def _muon(config: OptimizerConfig, width_ratio: float) -> optax.GradientTransformation:
  """Muon for the matrices inside blocks, AdamW for all other parameters."""
  matrix_axes = lambda tree: jax.tree.map(lambda x: contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), tree)  # the last two
  # An orthogonal matrix maps to vectors of equal length; this keeps the change of each output the same for every shape.
  scale_by_shape = lambda updates, _: jax.tree.map(lambda x: x * max(1, x.shape[-1] / x.shape[-2]) ** 0.5, updates)
  muon = optax.named_chain(
    ('muon', _complete_matrices(contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=matrix_axes))),
    ('shape', optax.stateless(scale_by_shape)),
    ('decay', optax.add_decayed_weights(config.weight_decay)),
    ('rate', scale_by_rate('muon_learning_rate')))
  return optax.partition({'muon': muon, 'adamw': _adamw(config, width_ratio)},
                         _by_name(lambda name: 'muon' if uses_muon(name) else 'adamw'))


def _lion(config: OptimizerConfig, width_ratio: float) -> optax.GradientTransformation:
  return _by_element(('lion', _scale_by_lion(config.b1, config.b2)), config, width_ratio)


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, float], optax.GradientTransformation]] = {'adamw': _adamw, 'muon': _muon, 'lion': _lion}
"""Functions that make an optimizer from a config, by config.name."""


def update(optimizer: optax.GradientTransformation, gradient: Any, norm: jax.Array, good: jax.Array, rates: Rates, state: Any,
           parameters: Any) -> tuple[Any, Any]:
  """Parameters and optimizer state after a step with this gradient of global norm `norm`, at these rates.

  A step that is not `good` leaves both bitwise unchanged.
  """
  updates, new = optax.with_extra_args_support(optimizer).update(gradient, state, parameters, norm=norm, good=good, rates=rates)
  selected = lambda node: isinstance(node, (optax.ScaleByAdamState, optax.ScaleByLionState))  # by `_scale_by_adam`, `_scale_by_lion`
  state = jax.tree.map(lambda new, old: new if selected(new) else optax.tree.where(good, new, old), new, state, is_leaf=selected)
  return optax.tree.where(good, optax.apply_updates(parameters, updates), parameters), state


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
  """optax.scale_by_adam (arXiv:1412.6980) that leaves moments and count as they were if not `good`, and can update them in place.

  The new parameters are computed from the selected moments. If old and new moments were selected later, XLA would compute the new ones a
  second time for the parameters, and keep a copy of the old ones: a twentieth of a step on a CPU.
  """
  adam = optax.scale_by_adam(b1, b2, eps)

  def update(updates, state, parameters=None, *, good=True, **_):
    _, new = adam.update(updates, state)
    new = optax.tree.where(good, new, state)
    mean, square = (optax.tree.bias_correction(moment, decay, new.count) for moment, decay in ((new.mu, b1), (new.nu, b2)))
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), new

  return optax.GradientTransformationExtraArgs(adam.init, update)


def _scale_by_lion(b1: float, b2: float) -> optax.GradientTransformationExtraArgs:
  """optax.scale_by_lion (arXiv:2302.06675), selected as `_scale_by_adam` does and for the same reason.

  The direction is the sign of b1 m + (1 - b1) g. The new moment n = b2 m + (1 - b2) g gives the same as r n + (1 - r) g with r = b1 / b2,
  so that nothing reads the old moment m once it is replaced.
  """
  lion, r = optax.scale_by_lion(b1, b2), b1 / b2

  def update(updates, state, parameters=None, *, good=True, **_):
    _, new = lion.update(updates, state)
    new = optax.tree.where(good, new, state)
    return jax.tree.map(lambda moment, g: jnp.sign(r * moment + (1 - r) * g), new.mu, updates), new

  return optax.GradientTransformationExtraArgs(lion.init, update)


def scale_by_rate(name: str) -> optax.GradientTransformationExtraArgs:
  """Descends at the rate that the step hands over. A count of its own would stand still at bad steps, and the schedule would not end."""
  def update(updates, state, parameters=None, *, rates, **_):
    return jax.tree.map(lambda update: -rates[name] * update, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
  """optax.clip_by_global_norm as a product, which XLA fuses into the readers of the gradient, while it writes a quotient to memory."""
  def update(updates, state, parameters=None, *, norm=None, **_):
    norm = optax.tree.norm(updates) if norm is None else norm
    factor = jnp.where(norm < limit, 1.0, limit / norm)
    return jax.tree.map(lambda g: g * factor, updates), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _by_name(role):
  return lambda parameters: {name: role(name) for name in parameters}


def _complete_matrices(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
  """Runs a transformation on complete matrices, and shards its results as the inputs were.

  Orthogonalizing needs a complete matrix, and optax's products do not say how sharded operands combine. The matrices of stacked layers
  are distributed over the devices; those of separate layers are orthogonalized by every device.
  """
  gather = lambda tree: jax.tree.map(lambda x: jax.reshard(x, _distributed(x.shape)), tree)
  back = lambda tree, like: jax.tree.map(lambda x, old: jax.reshard(x, jax.typeof(old).sharding.spec), tree, like)

  def update(updates, state, parameters=None):  # Muon's direction depends on gradients alone
    new, new_state = transformation.update(gather(updates), gather(state))
    return back(new, updates), back(new_state, state)

  return optax.GradientTransformation(transformation.init, update)


def _distributed(shape: tuple[int, ...]) -> PartitionSpec:
  """The sharding of complete matrices of stacked layers [L, in, out]: over as many axes of the mesh as divide the layers."""
  sizes = jax.sharding.get_abstract_mesh().shape
  axes: tuple[str, ...] = ()
  for axis in (STATE_AXIS, TENSOR_AXIS) if len(shape) == 3 else ():
    if shape[0] % math.prod(sizes[name] for name in (*axes, axis)) == 0:
      axes = (*axes, axis)
  return PartitionSpec(axes or None, *(None,) * (len(shape) - 1)) if shape else PartitionSpec()
