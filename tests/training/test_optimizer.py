"""Learning rates follow their formulas; decay, Muon and clipping touch the parameters meant, as published."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from tiers import full

from gptjax.config import ComputeConfig, ModelConfig, OptimizerConfig
from gptjax.model import abstract_model
from gptjax.training import learning_rates, make_optimizer
from gptjax.training.optimizer import has_weight_decay, schedule, update, uses_muon

STEPS, WARMUP, DECAY, PEAK, LOW = 50, 7, 20, 6e-4, 0.1
CONSTANT = {'schedule': 'constant', 'clip': 0.0}
NOW = {'steps': 10, 'warmup': 0, 'decay': 0}


def nanogpt(it):
  """get_lr of nanoGPT's train.py."""
  if it < WARMUP:
    return PEAK * (it + 1) / (WARMUP + 1)
  if it > STEPS:
    return PEAK * LOW
  ratio = (it - WARMUP) / (STEPS - WARMUP)
  return PEAK * LOW + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (PEAK - PEAK * LOW)


def rise(it):
  return min((it + 1) / (WARMUP + 1), 1)


def falling(it, start):
  return 1 - (1 - LOW) * min(max((it - start) / (STEPS - start), 0), 1)


FORMULAS = {
  'cosine': nanogpt,
  'linear': lambda it: PEAK * rise(it) * falling(it, WARMUP),
  'wsd': lambda it: PEAK * rise(it) * falling(it, STEPS - DECAY),
  'constant': lambda it: PEAK * rise(it),
}


@pytest.mark.parametrize('name', FORMULAS)
def test_a_schedule_follows_its_formula(name):
  config = OptimizerConfig(schedule=name, final_fraction=LOW, decay=DECAY if name == 'wsd' else 0)
  rate = schedule(config, PEAK, steps=STEPS, warmup=WARMUP, decay=DECAY)
  got = [float(rate(it)) for it in range(STEPS + 10)]
  np.testing.assert_allclose(got, [FORMULAS[name](it) for it in range(STEPS + 10)], rtol=1e-6, err_msg=name)
  assert max(got) == np.float32(PEAK) == np.float32(got[WARMUP])
  end = PEAK if name == 'constant' else PEAK * LOW
  np.testing.assert_allclose(got[STEPS:], end, rtol=1e-6)


@pytest.mark.parametrize('name', FORMULAS)
def test_a_warmup_longer_than_the_run_only_rises(name):
  config = OptimizerConfig(schedule=name, final_fraction=LOW)
  rate = schedule(config, PEAK, steps=5, warmup=20, decay=0)
  np.testing.assert_allclose([float(rate(it)) for it in range(5)], [PEAK * (it + 1) / 21 for it in range(5)], rtol=1e-6)


MODEL = {'layers': 2, 'width': 16, 'heads': 2, 'vocab_size': 20}
STYLES = [
  (MODEL, False), (MODEL, True),
  (MODEL | {'mlp': 'swiglu', 'positions': 'rope', 'norm': 'rmsnorm', 'qk_norm': 'head', 'tied': False, 'bias': False}, False)]


@pytest.mark.parametrize('values, scan', STYLES)
def test_roles_follow_from_the_names_of_parameters(values, scan):
  described = abstract_model(ModelConfig(**values), ComputeConfig(scan=scan), 8)
  for name, axes in described.axes.items():
    matrix = len(set(axes) - {'layers'}) == 2
    assert has_weight_decay(name) == matrix, name
    inside = name.split('/')[0] == 'blocks'
    assert uses_muon(name) == (matrix and inside), name
  assert {has_weight_decay(name) for name in described.axes} == {True, False}


SHAPES = {
  'tokens/table': (20, 16), 'positions/table': (8, 16), 'lm_head/kernel': (16, 24), 'norm/gain': (16,), 'norm/bias': (16,),
  'blocks/0/mlp/up/kernel': (16, 40), 'blocks/0/mlp/up/bias': (40,), 'blocks/0/mlp_norm/gain': (16,),
  'blocks/1/mlp/down/kernel': (40, 16)}
"""One parameter of every role; the optimizers distinguish parameters by name."""


def some(seed, shapes=SHAPES):
  """Random values of the parameters."""
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


def rates_of(config):
  """The learning rates by the number of steps taken."""
  return learning_rates(config, **NOW)


def first_update(config, gradients, parameters, width_ratio=1.0):
  """The updates and the state after the first of the optimizer's steps."""
  transformation = make_optimizer(config, width_ratio)
  return jax.jit(transformation.update)(gradients, transformation.init(parameters), parameters, rates=rates_of(config)(0))


@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'lion'])
def test_only_matrices_and_embeddings_decay(optimizer, one_device):
  config = OptimizerConfig(**CONSTANT, name=optimizer, peak_lr=0.5, muon_lr=0.25, weight_decay=0.1)
  parameters = some(0)
  updates, _ = first_update(config, jax.tree.map(jnp.zeros_like, parameters), parameters)
  for name, change in updates.items():
    rate = 0.25 if optimizer == 'muon' and uses_muon(name) else 0.5
    share = rate * 0.1 if has_weight_decay(name) else 0.0
    np.testing.assert_allclose(change, -share * parameters[name], rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon', 'lion'])
def test_by_mup_updates_shrink_as_the_width_grows_and_decay_does_not(optimizer, one_device):
  config = OptimizerConfig(**CONSTANT, name=optimizer, weight_decay=0.1)
  parameters = some(0)
  change = lambda gradients, *ratio: first_update(config, gradients, parameters, *ratio)[0]
  states = [jax.tree.structure(make_optimizer(config, ratio).init(parameters)) for ratio in (1.0, 4.0)]
  assert states[0] == states[1]  # so that checkpoints are alike
  decay = change(jax.tree.map(jnp.zeros_like, parameters))
  base, same, wide = change(some(1)), change(some(1), 1.0), change(some(1), 4.0)
  for name in parameters:
    np.testing.assert_array_equal(same[name], base[name], err_msg=name)
    # Of blocks the matrices, whose inputs grow, and the gains that stand for the factor of the logits (arXiv:2203.03466, table 8); Muon's
    # updates have the right size for every shape.
    shrinks = name.startswith('norm/') or (name.endswith('kernel') and name.startswith('blocks/') and optimizer != 'muon')
    np.testing.assert_allclose(wide[name] - decay[name], (base[name] - decay[name]) / (4 if shrinks else 1), 1e-4, 1e-9, err_msg=name)


def test_each_learning_rate_moves_its_own_parameters(one_device):
  for rate, in_blocks in (('muon_lr', False), ('peak_lr', True)):
    updates, _ = first_update(OptimizerConfig(**CONSTANT, name='muon', **{rate: 0.0}), some(1), some(0))
    for name, change in updates.items():
      assert np.any(change) == (uses_muon(name) == in_blocks), name


def newton_schulz(x):
  """Five quintic iterations towards the nearest orthogonal matrix, in float64 (Keller Jordan's coefficients)."""
  x = x / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  return x


def muon(gradients, parameter, *, beta, rate, decay):
  """The change of a matrix [in, out] by each of the gradients in turn, in float64."""
  changes, momentum = [], 0.0
  for t, gradient in enumerate(gradients, 1):
    momentum = beta * momentum + (1 - beta) * gradient
    ahead = beta * momentum / (1 - beta**(t + 1)) + (1 - beta) * gradient / (1 - beta**t)  # Nesterov, without bias
    stretch = math.sqrt(max(1, parameter.shape[1] / parameter.shape[0]))
    changes.append(-rate * (stretch * newton_schulz(ahead) + decay * parameter))
    parameter = parameter + changes[-1]
  return changes


@pytest.mark.parametrize('shape', [full((16, 40)), (40, 16), full((16, 16)), (3, 16, 40)])
def test_muon_is_newton_schulz_of_the_momentum_of_each_matrix(shape, one_device):
  config = OptimizerConfig(**CONSTANT, name='muon', muon_lr=0.03, weight_decay=0.2, momentum=0.9)
  transformation = make_optimizer(config)
  update = jax.jit(functools.partial(transformation.update, rates=rates_of(config)(0)))
  name = 'blocks/mlp/up/kernel'
  before, *gradients = (some(seed, {name: shape}) for seed in range(4))
  parameters, state, changes = before, transformation.init(before), []
  for gradient in gradients:
    updates, state = update(gradient, state, parameters)
    parameters = optax.apply_updates(parameters, updates)
    changes.append(updates[name])
  for layer in range(shape[0]) if len(shape) == 3 else [...]:  # stacked layers are as many matrices
    exact = lambda tree: np.float64(tree[name][layer])
    expected = muon([exact(g) for g in gradients], exact(before), beta=0.9, rate=0.03, decay=0.2)
    for got, want in zip(changes, expected, strict=True):
      np.testing.assert_allclose(got[layer], want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize('clip, length', [(0.5, 0.5), (1e3, None), (0.0, None)])
def test_the_gradient_is_clipped_to_a_global_norm(clip, length, one_device):
  gradients = some(1)
  _, state = first_update(OptimizerConfig(clip=clip, b1=0.9), gradients, some(0))
  taken = jax.tree.map(lambda moment: np.asarray(moment) / (1 - 0.9), optax.tree.get(state, 'mu'))
  norm = math.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients.values()))
  assert norm > 10
  for name, gradient in gradients.items():
    np.testing.assert_allclose(taken[name], gradient * (length or norm) / norm, rtol=2e-5, err_msg=name)


def test_clipping_on_and_off_keep_the_same_state(one_device):
  # A resumed run may switch it.
  on, off = (make_optimizer(OptimizerConfig(clip=clip)).init(some(0)) for clip in (1.0, 0.0))
  assert jax.tree.structure(on) == jax.tree.structure(off)


def sharded(tree):
  """Parameters or gradients on the mesh in force, sharded as ZeRO shards optimizer state."""
  spec = lambda x: PartitionSpec('data', 'model') if x.ndim == 2 else PartitionSpec(('model', 'data'))
  return jax.device_put(tree, {name: jax.NamedSharding(jax.sharding.get_mesh(), spec(x)) for name, x in tree.items()})


THEIRS = {'adamw': functools.partial(optax.adamw, eps=OptimizerConfig().eps), 'lion': optax.lion}


@pytest.mark.parametrize('name, clip, mesh', [
  ('adamw', 0.5, '4x2'), ('adamw', 0.0, '1x1'), ('lion', 0.5, '1x1'), full('adamw', 0.5, '1x1'), full('adamw', 0.0, '4x2'),
  full('adamw', 1e3, '1x1'), full('adamw', 1e3, '4x2'), full('lion', 0.0, '4x2')], indirect=['mesh'])
def test_adamw_and_lion_are_those_of_optax(name, clip, mesh):
  config = OptimizerConfig(name=name, clip=clip, peak_lr=0.1, schedule='linear', weight_decay=0.3)
  rate = schedule(config, 0.1, **NOW)
  theirs = optax.chain(optax.clip_by_global_norm(clip) if clip else optax.identity(), THEIRS[name](
    rate, config.b1, config.b2, weight_decay=0.3, mask=lambda tree: {name: has_weight_decay(name) for name in tree}))
  ours, rates = make_optimizer(config), rates_of(config)
  expected = parameters = sharded(some(0))
  state, theirs_state = jax.jit(ours.init)(parameters), theirs.init(expected)
  step = jax.jit(lambda gradient, good, count, state, parameters: update(
    ours, gradient, optax.tree.norm(gradient), good, rates(count), state, parameters))
  for seed in range(1, 4):
    gradient = sharded(some(seed))
    bad = sharded(some(9)) | {'norm/gain': gradient['norm/gain'] * jnp.nan}
    parameters, state = step(bad, False, seed, state, parameters)
    parameters, state = step(gradient, True, seed - 1, state, parameters)
    updates, theirs_state = jax.jit(theirs.update)(gradient, theirs_state, expected)
    expected = optax.apply_updates(expected, updates)
  for one in parameters:
    np.testing.assert_allclose(parameters[one], expected[one], rtol=2e-6, atol=1e-6, err_msg=one)
  got, want = state['update']['adam' if name == 'adamw' else name]._asdict(), theirs_state[1][0]._asdict()
  assert [*want] == ['count', 'mu'] + ['nu'] * (name == 'adamw')
  for moment in want:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-9, err_msg=moment), got[moment], want[moment])


@pytest.mark.parametrize('transformation', [make_optimizer(OptimizerConfig()), make_optimizer(OptimizerConfig(name='muon')),
                                            make_optimizer(OptimizerConfig(name='lion')), optax.sgd(0.1, momentum=0.9)],
                         ids=['adamw', 'muon', 'lion', 'of optax'])
def test_a_bad_step_changes_no_bit(transformation, one_device):
  rates = rates_of(OptimizerConfig(name='muon'))(0)
  step = jax.jit(lambda gradient, norm, good, *args: update(transformation, gradient, norm, good, rates, *args))
  before = step(some(1), jnp.float32(3), True, transformation.init(some(0)), some(0))
  after = step(some(2) | {'norm/gain': jnp.full(16, jnp.inf)}, jnp.float32(jnp.inf), False, before[1], before[0])
  for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize('name', ['adamw', 'lion'])
def test_an_update_makes_no_temporary_of_the_size_of_a_parameter(name, one_device):
  """The compiled update of a matrix has no array of its size but the gradient, and what it puts in place of moments and parameter."""
  transformation, shape = make_optimizer(OptimizerConfig(name=name)), (64, 96)
  parameters = some(0, {'head/kernel': shape})

  def step(gradient, targets, state):
    norm = optax.tree.norm(gradient) / targets
    gradient = jax.tree.map(lambda g: g * (1 / targets), gradient)
    return update(transformation, gradient, norm, norm < 1e6, rates_of(OptimizerConfig())(0), *reversed(state))

  state = parameters, transformation.init(parameters)  # donated arrays are reused in the order of the results
  compiled = jax.jit(step, donate_argnums=2).lower(parameters, jnp.float32(7), state).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < math.prod(shape) * 4
