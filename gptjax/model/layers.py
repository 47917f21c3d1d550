"""The small modules that the transformer is made of."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptjax.config import ModelConfig
from gptjax.model.weights import Stack, lookup, parameter, product, whole
from gptjax.sharding import Axis


class Linear(nnx.Module):
  """x W + b, with the logical axes of W: (input, output)."""

  def __init__(self, sizes: tuple[int, int], axes: tuple[Axis, Axis], std: float, config: ModelConfig, rngs: nnx.Rngs,
               stack: Stack = (), bias: bool = False):
    self.kernel = parameter(rngs, nnx.initializers.normal(std), sizes, axes, stack, config.compute_dtype)
    self.bias = parameter(rngs, nnx.initializers.zeros, sizes[1:], axes[1:], stack) if config.bias or bias else None
    self.again = config.remat == 'none' and not config.scan

  def __call__(self, x: Float[Array, 'N I'], rows: Axis = 'batch') -> Float[Array, 'N O']:
    y = product(x, self.kernel, rows, again=self.again)
    return y if self.bias is None else (y.astype(jnp.float32) + whole(self.bias)).astype(y.dtype)


class Norm(nnx.Module):
  """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last axis, in float32; gains of RMSNorm may be stored less 1."""

  def __init__(self, size: int, axis: Axis, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
    self.offset = config.norm == 'rmsnorm1p'
    self.gain = parameter(rngs, nnx.initializers.zeros if self.offset else nnx.initializers.ones, (size,), (axis,), stack)
    centered = config.norm == 'layernorm'
    self.bias = parameter(rngs, nnx.initializers.zeros, (size,), (axis,), stack) if centered and config.bias else None
    self.centered = centered
    self.eps = config.norm_eps
    self.dtype = config.compute_dtype

  def __call__(self, x: Float[Array, '*S D']) -> Float[Array, '*S D']:
    x = x.astype(jnp.float32)
    if self.centered:
      x = x - x.mean(-1, keepdims=True)
    gain = whole(self.gain)
    y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps) * (1 + gain if self.offset else gain)
    if self.bias is not None:
      y = y + whole(self.bias)
    return y.astype(self.dtype)


class Embedding(nnx.Module):
  """A table of vectors, looked up by id; those of tokens may be scaled."""

  def __init__(self, rows: int, axis: Axis, config: ModelConfig, rngs: nnx.Rngs,
               scaled: bool = False):
    self.table = parameter(rngs, nnx.initializers.normal(0.02), (rows, config.width), (axis, 'embed'), (), config.compute_dtype)
    self.scale = math.sqrt(config.width) if scaled else None

  def __call__(self, ids: Int[Array, 'N'], rows: Axis = 'batch') -> Float[Array, 'N D']:
    x = lookup(self.table, ids, rows)
    return x if self.scale is None else x * jnp.asarray(self.scale, x.dtype)


def capped(x: Float[Array, '*S'], cap: float) -> Float[Array, '*S']:
  """cap * tanh(x / cap) (arXiv:2408.00118, section 2); 0: x."""
  return cap * jnp.tanh(x / cap) if cap else x


def dropout(x: Float[Array, '*S'], rate: float, key: PRNGKeyArray | None) -> Float[Array, '*S']:
  """Zeroes a share `rate` of x and scales the rest up (arXiv:1207.0580); no key: returns x.

  The mask is drawn in place on each device and is the same on every mesh.
  """
  if key is None or not rate:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding.spec)
  return jnp.where(keep, x / (1 - rate), 0)
