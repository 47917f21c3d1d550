"""The mixture-of-experts layer (arXiv:1701.06538): a router chooses some experts for each token; no token is dropped.

A device routes its own tokens and holds its part of the experts, and of each expert's features where `model` splits them.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gptjax.config import TENSOR_AXIS, TOKENS_AXIS, ComputeConfig, ModelConfig
from gptjax.model import grouped
from gptjax.model.dispatch import exchanges, route
from gptjax.model.layers import MLP, Linear, Sums, matrix_std
from gptjax.model.weights import Stack, TokenAxis, all_rows, gathered, layer_axes, normal, parameter, tensor_psum
from gptjax.sharding import Weight, as_weight, manual_psum, spec, tensor_shard_map


class Experts(nnx.Module):
  """Experts in place of a feed-forward layer, each of the kind of model.mlp, without biases; `up`, `gate` and `down` are stacked."""

  def __init__(self, config: ModelConfig, compute: ComputeConfig, stack: Stack = ()):
    count, width, features = config.experts, config.width, config.expert_features
    hidden = ('mlp', features)

    def matrix(shape, axes, std):
      return parameter(normal(std), (count, *shape), ('experts', *axes), stack, compute.dtype)

    exact = dataclasses.replace(compute, dtype='float32')  # a rounded logit may choose another expert
    # Its outputs do not grow with the width, so that by muP its variance falls with the square (arXiv:2203.03466, table 8).
    self.router = Linear((width, count), ('embed', None), 0.02 / config.width_ratio, exact, stack)
    self.balance = parameter(nnx.initializers.zeros, (count,), (None,), stack) if config.router.bias else None
    self.up = Matrix(matrix((width, features), ('embed', hidden), matrix_std(config)))
    self.gate = Matrix(matrix((width, features), ('embed', hidden), matrix_std(config))) if config.mlp != 'gelu' else None
    self.down = Matrix(matrix((features, width), (hidden, 'embed'), matrix_std(config, residual=True)))
    shared = dataclasses.replace(config, mlp_width=config.shared_experts * features)
    self.shared = MLP(shared, compute, stack) if config.shared_experts else None
    self.config, self.compute = config, compute

  def __call__(self, x: Float[Array, 'N D'], layer: int | Int[Array, ''], mask: Float[Array, 'B T'],
               rows: TokenAxis) -> tuple[Float[Array, 'N D'], Sums]:
    """The weighted sum of the results of each token's experts, and the sums of the router's losses and statistics over the `mask`."""
    config = self.config
    logits = self.router(all_rows(x).astype(jnp.float32))
    score = jax.nn.softmax if config.router.score == 'softmax' else lambda x: jax.nn.sigmoid(x)
    scores = score(logits)
    biased = scores if self.balance is None else scores + gathered(self.balance)
    ids = jax.lax.top_k(jax.lax.stop_gradient(biased), config.experts_per_token)[1]
    chosen = ids[..., None] == jnp.arange(config.experts)  # [N, K, E]
    gains = jnp.where(chosen, scores[:, None], 0).sum(-1)
    if config.router.normalized:
      gains = gains / gains.sum(-1, keepdims=True)
    sums, load = _sums(config, logits, scores, chosen.sum(1), layer, mask)
    if self.balance is not None:
      gains = _balanced(gains, as_weight(self.balance.get_value()), load - load.mean())
    matrices = [part.kernel for part in (self.gate, self.up, self.down) if part is not None]
    static = _Static(config.mlp, grouped.expert_backend(self.compute), self.compute.dtype, config.experts, rows,
                     tuple(spec(None, *layer_axes(one)[1:]) for one in matrices))
    y = _experts(x, ids, gains, tuple(as_weight(one.get_value()) for one in matrices), static)
    return y if self.shared is None else y + self.shared(x, rows), sums


class Matrix(nnx.Module):
  """The matrices of all experts of a layer, under the name that a dense layer's has."""

  def __init__(self, kernel: nnx.Param):
    self.kernel = kernel


def no_sums(config: ModelConfig) -> Sums:
  """The sums of a layer without experts in a model that has some."""
  return {name: jnp.zeros(shape) for name, shape in (
    ('loss', ()), ('router_entropy', ()), ('load', (config.layers, config.experts)))} if config.experts else {}


def _sums(config, logits, scores, counts, layer, mask):
  """Sums over tokens, and the load of each expert: how many of them chose it.

  The balance loss is that of each row, E / (K T^2) * sum over experts of choices times normalized scores (arXiv:2412.19437, equations 17
  to 20), times its T tokens: so it depends neither on the microbatches nor on the devices that other rows are on.
  """
  rows = lambda x: x.reshape(*mask.shape, -1)
  each = scores / scores.sum(-1, keepdims=True)
  picked, probability = (jnp.einsum('bt,bte->be', mask, rows(x).astype(jnp.float32)) for x in (counts, each))
  # The tokens of a row may be on several devices; each adds its part of the probabilities.
  in_row, tokens = manual_psum((picked, mask.sum(1)), TOKENS_AXIS)
  balance = config.experts / config.experts_per_token * jnp.sum((in_row * probability).sum(-1) / jnp.maximum(tokens, 1))
  masked = lambda x: jnp.sum(mask.reshape(-1) * x)
  z = masked(jnp.square(jax.nn.logsumexp(logits, -1)))
  load, layers = jax.lax.stop_gradient(picked.sum(0)), jnp.arange(config.layers)
  entropy = -masked(jnp.sum(each * jnp.log(jnp.maximum(each, 1e-30)), -1)) / sum(map(config.has_experts, range(config.layers)))
  return {'loss': config.router.balance_loss * balance + config.router.z_loss * z, 'router_entropy': jax.lax.stop_gradient(entropy),
          'load': (layers == layer)[:, None] * load}, load


def load_metrics(load: Float[Array, 'L E']) -> dict[str, Array]:
  """What a step reports of the choices of experts: the share of each relative to the mean of its layer, and the largest share."""
  relative = load / jnp.maximum(load.mean(1, keepdims=True), 1e-30)
  return {'expert_load': relative, 'load_imbalance': relative.max()}


@jax.custom_vjp
def _balanced(gains: Float[Array, 'N K'], bias: Weight, excess: Float[Array, 'E']) -> Float[Array, 'N K']:
  """The gains; as the gradient of the bias it hands on the excess of each expert's load over the mean, by whose sign the optimizer
  moves the bias (arXiv:2408.15664, algorithm 1)."""
  return gains


_balanced.defvjp(lambda gains, bias, excess: (gains, (bias, excess)),
                 lambda saved, gradient: (gradient, saved[0].cotangent(saved[1]), None))


class _Static(NamedTuple):
  """The static arguments of a compiled layer."""

  kind: str
  backend: str
  dtype: str
  experts: int
  rows: TokenAxis
  splits: tuple[PartitionSpec, ...]
  """of the matrices"""

  def route(self, ids, gains, matrices):
    """The way to the experts, whose matrices say how many of them this device has."""
    groups = self.experts // matrices[0].shape[0]
    exchange = jax.lax.ragged_all_to_all if self.backend != 'blocks' and exchanges(groups, ids.shape[1]) else None
    return route(ids, gains, self.experts, groups, exchange)

  def sum(self, x, scattered):
    """The sum over the devices that split the features of experts, if some do."""
    if self.splits[0][2] is None:
      return x if not scattered else _own_rows(x)
    return tensor_psum(x, scattered)


def _own_rows(x):
  size = x.shape[0] // jax.lax.axis_size(TENSOR_AXIS)
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(TENSOR_AXIS) * size, size)


_WHOLE = PartitionSpec(None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _experts(x, ids, gains, weights, static):
  return _forward(x, ids, gains, weights, static)[0]


def _forward(x, ids, gains, weights, static):
  def local(x, ids, gains, matrices):
    way = static.route(ids, gains, matrices)
    out, parts = grouped.forward(static.backend, static.kind, way.send(x), way.rows, matrices)
    return static.sum(way.collect(out), static.rows is not None), parts

  features = PartitionSpec(None, static.splits[0][2])
  run = tensor_shard_map(local, (_WHOLE, _WHOLE, _WHOLE, static.splits),
                         (PartitionSpec(static.rows, None), (features,) * (len(weights) - 1)))
  y, parts = run(all_rows(x), ids, gains, tuple(one.read(static.dtype) for one in weights))
  names = ('gate', 'up')[-len(parts):]
  return y, (x, ids, gains, weights, tuple(map(checkpoint_name, parts, names)))


def _backward(static, saved, dy):
  x, ids, gains, weights, parts = saved

  def local(x, ids, gains, matrices, parts, dy):
    way = static.route(ids, gains, matrices)
    dx, dgains, sums = grouped.backward(static.backend, static.kind, way.send(x), way.rows, matrices, parts, way.send(dy))
    return static.sum(way.collect(dx), static.rows is not None), static.sum(way.collect_gains(dgains), False), sums

  features = PartitionSpec(None, static.splits[0][2])
  run = tensor_shard_map(local, (_WHOLE, _WHOLE, _WHOLE, static.splits, (features,) * len(parts), _WHOLE),
                         (PartitionSpec(static.rows, None), _WHOLE, static.splits))
  dx, dgains, sums = run(all_rows(x), ids, gains, tuple(one.read(static.dtype) for one in weights), parts, all_rows(dy))
  return dx, None, dgains, tuple(one.cotangent(gradient) for one, gradient in zip(weights, sums))


_experts.defvjp(_forward, _backward)
