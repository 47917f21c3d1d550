"""The small modules that the transformer is made of."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int, PRNGKeyArray

from gptjax.config import ModelConfig
from gptjax.sharding import spec

Stack = tuple[int, ...]
"""Leading axes of a module's parameters: () for one layer, (L,) for L layers that a scan runs through."""


def parameter(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: tuple[str, ...], stack: Stack) -> nnx.Param:
  """A float32 parameter that carries its logical axes; a stacked one gains the axis 'layers'."""
  value = init(rngs.params(), stack + shape, jnp.float32)
  return nnx.Param(value, axes=('layers',) * len(stack) + axes)


def whole(param: nnx.Param, dtype: str) -> Array:
  """A parameter as the model computes with it: cast, and gathered over `data` where ZeRO keeps it shared out."""
  value = param[...].astype(dtype)
  axes = param.get_metadata('axes')[-value.ndim:]  # inside a scan over layers the leading axis is gone
  return jax.reshard(value, spec(*axes))


class Linear(nnx.Module):
  """x W + b, with the logical axes of W: (input, output)."""

  def __init__(self, sizes: tuple[int, int], axes: tuple[str, str], std: float, config: ModelConfig, rngs: nnx.Rngs,
               stack: Stack = ()):
    self.kernel = parameter(rngs, nnx.initializers.normal(std), sizes, axes, stack)
    self.bias = parameter(rngs, nnx.initializers.zeros, sizes[1:], axes[1:], stack) if config.bias else None
    self.dtype = config.compute_dtype

  def __call__(self, x: Float[Array, 'N I']) -> Float[Array, 'N O']:
    # Where the input features are shared over `model`, the sum over them ends on every device of the axis.
    out = spec('batch', self.kernel.get_metadata('axes')[-1])
    y = jnp.matmul(x, whole(self.kernel, self.dtype), out_sharding=out)
    return y if self.bias is None else y + whole(self.bias, self.dtype)


class Norm(nnx.Module):
  """LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last axis, in float32."""

  def __init__(self, size: int, axis: str, config: ModelConfig, rngs: nnx.Rngs, stack: Stack = ()):
    self.gain = parameter(rngs, nnx.initializers.ones, (size,), (axis,), stack)
    centered = config.norm == 'layernorm'
    self.bias = parameter(rngs, nnx.initializers.zeros, (size,), (axis,), stack) if centered and config.bias else None
    self.centered = centered
    self.dtype = config.compute_dtype

  def __call__(self, x: Float[Array, '*S D']) -> Float[Array, '*S D']:
    x = x.astype(jnp.float32)
    if self.centered:
      x = x - x.mean(-1, keepdims=True)
    y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * whole(self.gain, 'float32')
    if self.bias is not None:
      y = y + whole(self.bias, 'float32')
    return y.astype(self.dtype)


class Embedding(nnx.Module):
  """A table of vectors, looked up by id."""

  def __init__(self, rows: int, axis: str, config: ModelConfig, rngs: nnx.Rngs):
    self.table = parameter(rngs, nnx.initializers.normal(0.02), (rows, config.width), (axis, 'embed'), ())
    self.dtype = config.compute_dtype

  def __call__(self, ids: Int[Array, 'N']) -> Float[Array, 'N D']:
    return whole(self.table, self.dtype).at[ids].get(out_sharding=spec('batch', 'embed'))


def dropout(x: Float[Array, '*S'], rate: float, key: PRNGKeyArray | None) -> Float[Array, '*S']:
  """Zeroes a share `rate` of x and scales the rest up (arXiv:1207.0580); no key: returns x.

  The mask is drawn in place on each device and is the same on every mesh.
  """
  if key is None or not rate:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding.spec)
  return jnp.where(keep, x / (1 - rate), 0)
