"""The output head: logits, losses and log-probabilities from hidden states, without the logits of a complete batch.

Only one chunk's logits exist at a time. Each device has its part of the ids (vocabulary-parallel cross-entropy, arXiv:1909.08053,
section 3); maxima and sums over ids cross the mesh axis that splits matrices. Rows are local, so sums over tokens are those of one device.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gptjax.model.layers import capped
from gptjax.model.weights import all_rows, layer_axes, product, tensor_psum
from gptjax.sharding import as_weight, spec, tensor_shard_map

CHUNK_BYTES = 2**27
"""Size of a chunk's float32 logits on a device."""
CHUNK_ROWS = 256
"""Minimum number of tokens of a chunk, since each chunk reads and writes the gradient of the complete head."""


@dataclasses.dataclass(frozen=True)
class Head:
  """The layer from hidden states to probabilities of ids."""

  param: nnx.Param
  """W [D, V], or the embedding table [V, D] if transposed"""
  transposed: bool
  vocab_size: int
  """ids from here on pad the table and have no probability"""
  cap: float = 0.0
  """logits s become cap * tanh(s / cap); 0: unchanged"""

  def logits(self, hidden: Float[Array, 'N D']) -> Float[Array, 'N V']:
    """float32 logits over the table's rows; those of padded ids, which no text has, are -1e30."""
    logits = capped(product(hidden, self.param, None, transposed=self.transposed).astype(jnp.float32), self.cap)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1, out_sharding=jax.typeof(logits).sharding.spec)
    return jnp.where(ids < self.vocab_size, logits, -1e30)

  def cross_entropy(self, hidden: Float[Array, 'N D'], targets: Int[Array, 'N'], mask: Float[Array, 'N'],
                    z_loss: float = 0.0) -> tuple[Float[Array, ''], Float[Array, '']]:
    """The sum over tokens of mask * -log softmax(hidden W)[target], in nats, with and without z_loss * log(Z)^2.

    The z-loss is that of arXiv:2204.02311, section 5. Gradients flow through the first sum, and are computed together with it, so that
    no product is computed twice.
    """
    total, loss = _cross_entropy(hidden, as_weight(self.param.get_value()), targets, mask, self._static, z_loss)
    return total, jax.lax.stop_gradient(loss)

  def log_probabilities(self, hidden: Float[Array, 'N D'], targets: Int[Array, 'N']) -> tuple[Float[Array, 'N'], Bool[Array, 'N']]:
    """log softmax(hidden W)[target] of each token, in nats, and whether its target is the most likely id (of equal ones the lowest)."""
    return _log_probabilities(hidden, as_weight(self.param.get_value()), targets, self._static)

  @property
  def _static(self) -> '_Static':
    return _Static(self.param.get_metadata('dtype'), spec(*layer_axes(self.param)), self.transposed, self.vocab_size, self.cap)


@dataclasses.dataclass(frozen=True)
class _Static:
  """The static arguments of a compiled loss."""

  dtype: str
  split: PartitionSpec
  transposed: bool
  vocab_size: int
  cap: float

  @property
  def axis(self) -> str | None:
    """The mesh axis that splits the ids, if one does."""
    return self.split[0 if self.transposed else 1]

  def rows(self, w: Array) -> tuple[Float[Array, 'V D'], Int[Array, 'V']]:
    """This device's part of W^T, or of the table, and the ids of its rows."""
    w = w if self.transposed else w.T
    return w, (0 if self.axis is None else jax.lax.axis_index(self.axis) * w.shape[0]) + jnp.arange(w.shape[0])

  def over_ids(self, x: Array, reduce: Callable = jax.lax.psum) -> Array:
    """The sum, or another reduction, over the devices that split the ids."""
    return x if self.axis is None else reduce(x, self.axis)

  def logits(self, h, w, ids):
    """For this device's ids: logits [n, v] with their cap, the same with -1e30 for ids that pad the table, the highest [n] on any device,
    and exponentials [n, v] of the distance to it."""
    soft = capped(jnp.matmul(h, w.T, preferred_element_type=jnp.float32), self.cap)
    logits = jnp.where(ids < self.vocab_size, soft, -1e30)
    highest = self.over_ids(logits.max(-1), jax.lax.pmax)
    return soft, logits, highest, jnp.exp(logits - highest[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cross_entropy(hidden, weight, targets, mask, static, z_loss):
  return _sums(hidden, weight, targets, mask, static, z_loss, gradients=False)[:2]


def _cross_entropy_forward(hidden, weight, targets, mask, static, z_loss):
  total, loss, dh, dw = _sums(hidden, weight, targets, mask, static, z_loss, gradients=True)
  return (total, loss), (dh, dw, weight)


def _cross_entropy_backward(static, z_loss, saved, cotangents):
  dh, dw, weight = saved
  scale = cotangents[0]
  return (dh * scale).astype(dh.dtype), weight.cotangent(dw * scale), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probabilities(hidden, weight, targets, static):
  def local(h, w, targets):
    w, ids = static.rows(w)

    def chunk(_, part):
      h, targets = part
      _, logits, highest, exponentials = static.logits(h, w, ids)
      own = static.over_ids(jnp.where(ids == targets[:, None], logits, 0).sum(-1))
      most_likely = static.over_ids(jnp.where(logits == highest[:, None], ids, static.vocab_size).min(-1), jax.lax.pmin)
      return None, (own - highest - jnp.log(static.over_ids(exponentials.sum(-1))), most_likely == targets)

    return _in_chunks(chunk, None, (h, targets), 4 * w.shape[0])[1]

  one = PartitionSpec(None)
  run = tensor_shard_map(local, (PartitionSpec(None, None), static.split, one), (one, one))
  return run(all_rows(hidden).astype(static.dtype), weight.read(static.dtype), targets)


def _log_probabilities_backward(static, saved, cotangents):
  hidden, weight, targets = saved
  # They are negative cross-entropies, weighted by their cotangents.
  *_, dh, dw = _sums(hidden, weight, targets, -cotangents[0], static, 0.0, gradients=True)
  return dh, weight.cotangent(dw), None


_log_probabilities.defvjp(lambda *inputs: (_log_probabilities(*inputs), inputs[:3]), _log_probabilities_backward)


def _sums(hidden, weight, targets, mask, static, z_loss, *, gradients):
  """Both losses and, if asked for, the gradients of the first with respect to hidden and to the complete W."""
  rows = jax.typeof(hidden).sharding.spec[0]  # split over `model` under sequence parallelism

  def local(h, w, targets, mask):
    w, ids = static.rows(w)

    def chunk(sums, part):
      h, targets, mask = part
      soft, logits, highest, exponentials = static.logits(h, w, ids)
      total = static.over_ids(exponentials.sum(-1))
      hit = ids == targets[:, None]
      normalizer = highest + jnp.log(total)
      losses = mask * (normalizer - static.over_ids(jnp.where(hit, logits, 0).sum(-1)))
      loss, extra = sums[0] + losses.sum(), sums[1] + (mask * z_loss * jnp.square(normalizer)).sum()
      if not gradients:
        return (loss, extra), None
      share = mask * (1 + 2 * z_loss * normalizer) / total
      dlogits = share[:, None] * exponentials - jnp.where(hit, mask[:, None], 0)
      dlogits = (dlogits * (1 - jnp.square(soft / static.cap)) if static.cap else dlogits).astype(h.dtype)  # tanh' = 1 - tanh^2
      dw = sums[2] + jnp.einsum('nv,nd->vd', dlogits, h, preferred_element_type=jnp.float32)
      return (loss, extra, dw), dlogits @ w

    sums = (jnp.float32(0), jnp.float32(0)) + ((jnp.zeros(w.shape, jnp.float32),) if gradients else ())
    sums, dh = _in_chunks(chunk, sums, (h, targets, mask), 4 * w.shape[0])
    losses = sums[0] + sums[1], sums[0]
    if not gradients:
      return losses
    if static.axis is not None:
      dh = tensor_psum(dh, scattered=rows is not None)
    return *losses, dh, sums[2] if static.transposed else sums[2].T

  one, vector, matrix = PartitionSpec(), PartitionSpec(None), PartitionSpec(None, None)
  out = (one, one, matrix if static.axis is None else PartitionSpec(rows, None), static.split) if gradients else (one, one)
  run = tensor_shard_map(local, (matrix, static.split, vector, vector), out)
  found = run(all_rows(hidden).astype(static.dtype), weight.read(static.dtype), targets, mask)
  if not gradients:
    return found
  return *found[:2], jax.reshard(found[2], jax.typeof(hidden).sharding.spec).astype(hidden.dtype), found[3]


def _in_chunks(chunk, sums, inputs, row_bytes):
  """Runs chunk(sums, part) over parts of the inputs' rows, a few at a time; returns the sums and all rows of its results."""
  rows = inputs[0].shape[0]
  size = max(CHUNK_ROWS, CHUNK_BYTES // row_bytes)
  if rows <= size:
    return chunk(sums, inputs)
  count = -(-rows // size)
  size = -(-rows // count)
  padding = count * size - rows  # with a mask of zeros
  parts = jax.tree.map(lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:]), inputs)
  sums, results = jax.lax.scan(chunk, sums, parts)
  return sums, jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:])[:rows], results)
