"""The small modules that the transformer is made of."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from gptjax.config import ComputeConfig, LoraConfig, ModelConfig
from gptjax.model.weights import Stack, TokenAxis, gathered, layer_axes, lookup, normal, parameter, product, uniform
from gptjax.sharding import Axis, token_places

Sums = dict[str, Array]
"""Scalars by name, each a sum over the tokens of a device's rows; 'loss' adds to the loss, others are reported."""


class Linear(nnx.Module):
  """x W + b, with the logical axes of W: (input, output). Layers of a module that read the same x give it the same name, `input`.

  With an adapter it is x W + scale * (x A) B + b.
  """

  def __init__(self, sizes: tuple[int, int], axes: tuple[Axis, Axis], std: float, compute: ComputeConfig, stack: Stack = (),
               bias: bool = False, input: str = ''):
    self.kernel = parameter(normal(std), sizes, axes, stack, compute.dtype, input)
    self.bias = parameter(nnx.initializers.zeros, sizes[1:], axes[1:], stack) if bias else None
    self.regather = compute.remat == 'none' and not compute.scan
    self.lora_a: nnx.Param | None = nnx.data(None)
    self.lora_b: nnx.Param | None = nnx.data(None)
    self.lora_scale = 0.0

  def adapt(self, lora: LoraConfig) -> None:
    """Adds an adapter, which changes nothing at first (arXiv:2106.09685, section 4.1): A is uniform within 1/sqrt(inputs), as in PEFT, and
    B is zero."""
    *stack, inputs, outputs = self.kernel.get_value().shape
    axes, dtype = layer_axes(self.kernel), self.kernel.get_metadata('dtype')
    self.lora_a = parameter(uniform(1 / math.sqrt(inputs)), (inputs, lora.rank), (axes[0], None), tuple(stack), dtype)
    self.lora_b = parameter(nnx.initializers.zeros, (lora.rank, outputs), (None, axes[1]), tuple(stack), dtype)
    self.lora_scale = lora.scale

  def __call__(self, x: Float[Array, 'N I'], rows: TokenAxis = None) -> Float[Array, 'N O']:
    y = product(x, self.kernel, rows, regather=self.regather)
    if self.lora_a is not None and self.lora_b is not None:
      y = y + self.lora_scale * product(product(x, self.lora_a, rows), self.lora_b, rows)
    return y if self.bias is None else (y.astype(jnp.float32) + gathered(self.bias)).astype(y.dtype)


class Norm(nnx.Module):
  """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last axis, in float32; RMSNorm may store its gains minus 1."""

  def __init__(self, size: int, axis: Axis, config: ModelConfig, compute: ComputeConfig, stack: Stack = (), gain: float = 1.0):
    """`gain`: the initial one of all features."""
    self.offset = config.norm == 'rmsnorm1p'
    self.gain = parameter(nnx.initializers.constant(gain - 1 if self.offset else gain), (size,), (axis,), stack)
    self.centered = config.norm == 'layernorm'
    self.bias = parameter(nnx.initializers.zeros, (size,), (axis,), stack) if self.centered and config.bias else None
    self.eps = config.norm_eps
    self.dtype = compute.dtype

  def __call__(self, x: Float[Array, '*S D']) -> Float[Array, '*S D']:
    def norm(x, gain, bias):
      x = x.astype(jnp.float32)
      if self.centered:
        x = x - x.mean(-1, keepdims=True)
      y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps) * (1 + gain if self.offset else gain)
      return (y if bias is None else y + bias).astype(self.dtype)

    if self.dtype != 'float32':  # else the backward pass would keep two arrays in float32, of twice the size of x
      norm = jax.checkpoint(norm, prevent_cse=False)  # whose barrier made the memory of scanned layers grow
    return norm(x, gathered(self.gain), None if self.bias is None else gathered(self.bias))


class Embedding(nnx.Module):
  """A table of vectors, looked up by id; those of tokens may be scaled."""

  def __init__(self, rows: int, width: int, axis: Axis, compute: ComputeConfig, scaled: bool = False):
    self.table = parameter(normal(0.02), (rows, width), (axis, 'embed'), (), compute.dtype)
    self.scale = math.sqrt(width) if scaled else None

  def __call__(self, ids: Int[Array, 'N'], rows: TokenAxis = None) -> Float[Array, 'N D']:
    x = lookup(self.table, ids, rows)
    return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)


def matrix_std(config: ModelConfig, residual: bool = False) -> float:
  """The standard deviation of a block's initial matrices: 0.02; as in GPT-2, smaller for those whose outputs add to the residual stream,
  two per layer. By muP the variance falls as the width grows (arXiv:2203.03466, table 8)."""
  return 0.02 / math.sqrt(config.width_ratio) / (math.sqrt(2 * config.layers) if residual else 1)


class MLP(nnx.Module):
  """The feed-forward layer: GELU between two matrices, or a gated one, SwiGLU or GEGLU (arXiv:2002.05202)."""

  def __init__(self, config: ModelConfig, compute: ComputeConfig, stack: Stack = ()):
    wide, axes = (config.width, config.hidden_width), ('embed', ('mlp', config.hidden_width))
    self.up = Linear(wide, axes, matrix_std(config), compute, stack, config.bias, 'x')
    self.gate = Linear(wide, axes, matrix_std(config), compute, stack, config.bias, 'x') if config.mlp != 'gelu' else None
    # Computed again in the backward pass: JAX would keep a second array of this width. gelu's tanh approximation is jax's default.
    self.activation = jax.checkpoint(jax.nn.silu if config.mlp == 'swiglu' else jax.nn.gelu)
    self.down = Linear(wide[::-1], axes[::-1], matrix_std(config, residual=True), compute, stack, config.bias)

  def __call__(self, x: Float[Array, 'N D'], rows: TokenAxis) -> Float[Array, 'N D']:
    up = checkpoint_name(self.up(x), 'up')
    hidden = self.activation(up) if self.gate is None else self.activation(checkpoint_name(self.gate(x), 'gate')) * up
    return self.down(checkpoint_name(hidden, 'hidden'), rows)


def capped(x: Float[Array, '*S'], cap: float) -> Float[Array, '*S']:
  """cap * tanh(x / cap) (arXiv:2408.00118, section 2); 0: x."""
  return cap * jnp.tanh(x / cap) if cap else x


_folded = jnp.vectorize(jax.random.fold_in)


def fold(keys: Key[Array, 'B'] | None, data: int | Int[Array, '']) -> Key[Array, 'B'] | None:
  """A key per row from a key per row and a number; None stays None."""
  return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def dropout(x: Float[Array, 'N *S'], rate: float, keys: Key[Array, 'B'] | None) -> Float[Array, 'N *S']:
  """Zeroes a fraction `rate` of x, N = B * T, and scales up the rest (arXiv:1207.0580); keys: one per row, or None to return x."""
  return drop(x, keep_mask(x, rate, keys), rate)


def keep_mask(x: Float[Array, 'N *S'], rate: float, keys: Key[Array, 'B'] | None) -> Bool[Array, 'N *S'] | None:
  """Which elements of x dropout keeps, sharded as x is: a token's mask is drawn from its row's key and its place in the row. None: all."""
  if keys is None or not rate:
    return None
  split = jax.typeof(x).sharding.spec
  places = token_places(x.shape[0] // keys.shape[0])
  draw = lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:], out_sharding=PartitionSpec(*split[1:]))
  return jax.reshard(jax.vmap(draw)(_folded(keys[:, None], places).reshape(x.shape[0])), split)


def weight_keys(rate: float, keys: Key[Array, 'B'] | None, heads: Int[Array, 'K G'],
                places: Int[Array, 'T']) -> Key[Array, 'B K G T'] | None:
  """A key for the attention weights of each query, from those of rows, the numbers of heads and the places in rows; None: no dropout."""
  return None if keys is None or not rate else _folded(_folded(keys[:, None, None, None], heads[:, :, None]), places)


def keep_weights(rate: float, keys: Key[Array, 'B K G T'] | None, places: Int[Array, 'S']) -> Bool[Array, 'B K S G T'] | None:
  """Which weights of the attention to tokens at these places dropout keeps, with `weight_keys`; None: all.

  Each one is a hash of its query's key and its place, so that any part of the square can be drawn alone. With JAX's own generator,
  attention and its gradient took more than twice as long on a CPU.
  """
  if keys is None:
    return None
  first, second = jnp.moveaxis(jax.random.key_data(keys[:, :, None]), -1, 0)
  places = places.astype(jnp.uint32)[:, None, None]
  return _mixed(_mixed(first ^ places) ^ second) >= jnp.uint32(rate * 2**32)


def _mixed(x: UInt32[Array, '*S']) -> UInt32[Array, '*S']:
  """A one-to-one function in which every bit depends on all (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def drop(x: Float[Array, 'N *S'], kept: Bool[Array, 'N *S'] | None, rate: float) -> Float[Array, 'N *S']:
  """x with what is not `kept` set to zero and the rest scaled up."""
  return x if kept is None else jnp.where(kept, x / (1 - rate), 0)
