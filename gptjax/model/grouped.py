"""The feed-forward layers of several experts on one device, forward and backward, for tokens that are sorted by expert.

CPUs run a loop over blocks of a few tokens, which read the matrices of their expert: XLA's ragged products take several times as long
there. Only the last block of an expert is padded. TPUs compute gradients of matrices by a Pallas kernel: XLA's ragged product over rows
multiplies all of them for every expert.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptjax.config import ComputeConfig

BLOCKS = 256, 64
"""Tokens of a block: an expert's in large blocks first, then the rest in small ones. Large ones read matrices and add up their gradients
less often, small ones pad less."""

TILES = 512, 512, 512
"""Rows and features of a tile of the Pallas kernel; three tiles, two of them twice, fit a core's memory."""

Matrices = tuple[Float[Array, 'G _ _'], ...]
"""Of this device's experts: (up, down) or (gate, up, down), with this device's part of the hidden features."""


class Sorted(NamedTuple):
  """Rows, one for each pair of a token and one of its experts, sorted by expert. Rows of other devices' experts come last."""

  token: Int[Array, 'R']
  """that each row is for"""
  gain: Float[Array, 'R']
  """factor of the expert's result; 0 in rows of other devices' experts"""
  sizes: Int[Array, 'G']
  """rows of each expert of this device"""


def expert_backend(compute: ComputeConfig, platform: str | None = None) -> str:
  """compute.experts, 'auto' resolved, for a platform ('cpu', 'gpu', 'tpu'; default: this process's)."""
  default = {'cpu': 'blocks', 'tpu': 'megablox'}.get(platform or jax.default_backend(), 'ragged')
  return default if compute.experts == 'auto' else compute.experts


def activate(kind: str, *parts: Float[Array, '*S']) -> Float[Array, '*S']:
  """The hidden layer of model.mlp `kind`: from x up, or from x gate and x up."""
  if kind == 'gelu':
    return jax.nn.gelu(parts[0])
  return (jax.nn.silu if kind == 'swiglu' else jax.nn.gelu)(parts[0]) * parts[1]


def forward(backend: str, kind: str, x: Float[Array, 'M D'], rows: Sorted,
            matrices: Matrices) -> tuple[Float[Array, 'Q D'], tuple[Float[Array, 'Q _'], ...]]:
  """gain * expert(x[index]) of every row, and the products with x, which `backward` needs. Q is R or more; what belongs to no expert of
  this device is 0."""
  if backend == 'blocks':
    return _forward_in_blocks(kind, x, rows, matrices)
  rows = _in_tiles(rows)
  *into, down = matrices
  parts = tuple(jax.lax.ragged_dot(x[rows.token], w, rows.sizes) for w in into)
  out = jax.lax.ragged_dot(activate(kind, *parts), down, rows.sizes) * rows.gain[:, None]
  return jnp.where(_own(rows), out, 0).astype(x.dtype), parts


def backward(backend: str, kind: str, x: Float[Array, 'M D'], rows: Sorted, matrices: Matrices, parts: tuple[Float[Array, 'Q _'], ...],
             dy: Float[Array, 'M D']) -> tuple[Float[Array, 'Q D'], Float[Array, 'Q'], Matrices]:
  """Gradients of the sum over rows of dy[index] * gain * expert(x[index]): by x[index] and by gain, for every row, and by the matrices,
  in float32."""
  if backend == 'blocks':
    return _backward_in_blocks(kind, x, rows, matrices, parts, dy)
  rows = _in_tiles(rows)
  outer = functools.partial(_tiled_outer if backend == 'megablox' else _outer, rows.sizes)
  back = lambda a, w: jax.lax.ragged_dot(a, w.swapaxes(1, 2), rows.sizes)
  dx, dgain, sums = _gradients(kind, x[rows.token], rows.gain, matrices, parts, dy[rows.token], back, outer)
  own = _own(rows)
  return jnp.where(own, dx, 0), jnp.where(own[:, 0], dgain, 0), sums


def _in_tiles(rows: Sorted) -> Sorted:
  more = -rows.token.shape[0] % TILES[0]
  return Sorted(jnp.pad(rows.token, (0, more)), jnp.pad(rows.gain, (0, more)), rows.sizes)


def _outer(sizes: Int[Array, 'G'], a: Float[Array, 'Q I'], b: Float[Array, 'Q O']) -> Float[Array, 'G I O']:
  """The product of both arrays' rows of each expert."""
  contract = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  return jax.lax.ragged_dot_general(a, b, sizes, contract, preferred_element_type=jnp.float32)


def _tiled_outer(sizes: Int[Array, 'G'], a: Float[Array, 'Q I'], b: Float[Array, 'Q O'], interpret: bool = False) -> Float[Array, 'G I O']:
  """The same by a Pallas kernel for TPUs (arXiv:2211.15841); `interpret`: run it on a CPU."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
  tiling = tuple(map(min, TILES, (a.shape[0], a.shape[1], b.shape[1])))
  return tgmm(a.T, b, sizes, jnp.float32, tiling, interpret=interpret)


def _own(rows: Sorted) -> Array:
  return (jnp.arange(rows.token.shape[0]) < rows.sizes.sum())[:, None]


def _gradients(kind, x, gain, matrices, parts, dy, back, outer):
  """Gradients for rows of x, given the product `back` with a transposed matrix, and the product `outer` of two arrays' rows."""
  *into, down = matrices
  hidden, pullback = jax.vjp(functools.partial(activate, kind), *parts)
  dhidden = back(dy, down)
  dgain = jnp.sum(hidden * dhidden, -1, dtype=jnp.float32)  # the result's product with dy, without the result
  dparts = pullback((dhidden * gain[:, None]).astype(hidden.dtype))
  sums = (*(outer(x, d) for d in dparts), outer((hidden * gain[:, None]).astype(x.dtype), dy))
  return functools.reduce(jnp.add, map(back, dparts, into)), dgain, sums


def _forward_in_blocks(kind, x, rows, matrices):
  def block(index, gain, own, matrices):
    *into, down = matrices
    parts = tuple(x[index] @ w for w in into)
    return (activate(kind, *parts) @ down * gain[:, None], *parts), ()

  shapes = [(x.shape[1:], x.dtype), *((w.shape[2:], x.dtype) for w in matrices[:-1])]
  (out, *parts), _ = _in_blocks(rows, matrices, (), block, shapes, summed=False)
  return out, tuple(parts)


def _backward_in_blocks(kind, x, rows, matrices, parts, dy):
  def block(index, gain, own, matrices, *parts):
    dx, dgain, sums = _gradients(kind, x[index], gain, matrices, parts, dy[index], lambda a, w: a @ w.T,
                                 lambda a, b: jnp.einsum('ni,no->io', a, b, preferred_element_type=jnp.float32))
    return (dx, jnp.where(own, dgain, 0)), sums

  (dx, dgain), sums = _in_blocks(rows, matrices, parts, block, [(x.shape[1:], x.dtype), ((), jnp.float32)], summed=True)
  return dx, dgain, sums


def _in_blocks(rows: Sorted, matrices: Matrices, given: tuple[Array, ...], block: Callable,
               shapes: Sequence[tuple[Any, Any]], summed: bool):
  """Runs block(index, gain, own, matrices of an expert, *rows of `given`) -> (results, what it adds to the sums of its expert).

  `own` tells which rows are the expert's; the gain of others is 0. Those of the next expert come after them: its own blocks, which run
  later, replace their results. `shapes` and dtypes are those of a row of each result.
  """
  count = rows.token.shape[0]
  index, gain = (jnp.pad(x, (0, BLOCKS[-1])) for x in (rows.token, rows.gain))
  first = jnp.cumsum(rows.sizes) - rows.sizes
  put = lambda all_rows, part, at: jax.lax.dynamic_update_slice_in_dim(all_rows, part.astype(all_rows.dtype), at, 0)

  def group(expert, carry):
    matrices_of = tuple(w[expert] for w in matrices)  # read once for all blocks
    end = first[expert] + rows.sizes[expert]

    def in_blocks(size, start, number, carry):
      def one(number, carry):
        at = start + number * size
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, at, size)
        own = at + jnp.arange(size) < end
        found, added = block(cut(index), jnp.where(own, cut(gain), 0), own, matrices_of, *map(cut, given))
        return tuple(put(*both, at) for both in zip(carry[0], found)), tuple(map(jnp.add, carry[1], added))
      return jax.lax.fori_loop(0, number, one, carry)

    results, totals = carry
    carry, start = (results, tuple(jnp.zeros(total.shape[1:], jnp.float32) for total in totals)), first[expert]
    large, small = BLOCKS
    if large <= count:
      number = rows.sizes[expert] // large
      carry, start = in_blocks(large, start, number, carry), start + number * large
    results, sums = in_blocks(small, start, -(-(end - start) // small), carry)
    return results, tuple(put(total, one[None], expert) for total, one in zip(totals, sums))

  results = tuple(jnp.zeros((count + BLOCKS[-1], *shape), dtype) for shape, dtype in shapes)
  totals = tuple(jnp.zeros(w.shape, jnp.float32) for w in matrices) if summed else ()
  return jax.lax.fori_loop(0, matrices[0].shape[0], group, (results, totals))
