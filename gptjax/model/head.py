"""The output head: logits, losses and log-probabilities from hidden states, without the logits of a complete batch.

Only one chunk's logits exist at a time. Each device has its part of the ids (vocabulary-parallel cross-entropy, arXiv:1909.08053,
section 3); maxima and sums over ids cross the mesh axis that splits matrices. Rows are local, so sums over tokens are those of one device.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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


@functools.partial(jax.tree_util.register_dataclass, data_fields=['rows'], meta_fields=['vocab_size', 'cap'])
@dataclasses.dataclass(frozen=True)
class FixedHead:
  """The head of another model, which is not trained."""

  rows: Any  # an array; transformations of trees put other things in its place
  """W^T [V, H], with as many rows as the table of the trained head, split as that is"""
  vocab_size: int
  """ids from here on are not in both vocabularies"""
  cap: float = 0.0


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
    return self._loss(hidden, (targets, mask), None, _CrossEntropy(z_loss))

  def divergence(self, hidden: Float[Array, 'N D'], targets: Int[Array, 'N'], mask: Float[Array, 'N'], teacher: FixedHead,
                 taught: Float[Array, 'N H'], reverse: bool, temperature: float) -> tuple[Float[Array, ''], Float[Array, '']]:
    """The sum over tokens of mask * temperature^2 * KL(p || q), in nats, and that of the cross-entropy of the targets.

    q is softmax(hidden W / temperature), p the same of the teacher, over the ids of both vocabularies; KL(q || p) if `reverse`. The factor
    keeps gradients of one size (arXiv:1503.02531, section 2.1). They flow through the first sum, to hidden and W.
    """
    return self._loss(hidden, (targets, mask, taught), teacher, _Divergence(reverse, temperature))

  def log_probabilities(self, hidden: Float[Array, 'N D'], targets: Int[Array, 'N']) -> tuple[Float[Array, 'N'], Bool[Array, 'N']]:
    """log softmax(hidden W)[target] of each token, in nats, and whether its target is the most likely id (of equal ones the lowest)."""
    return _log_probabilities(hidden, as_weight(self.param.get_value()), targets, self._static)

  def _loss(self, hidden, inputs, teacher, loss):
    total, metric = _summed(hidden, as_weight(self.param.get_value()), inputs, teacher, self._static, loss)
    return total, jax.lax.stop_gradient(metric)

  @property
  def _static(self) -> '_Static':
    return _Static(self.param.get_metadata('dtype'), spec(*layer_axes(self.param)), self.transposed, self.vocab_size, self.cap)


class _Logits(NamedTuple):
  """Logits of tokens, for this device's ids."""

  values: Float[Array, 'N V']
  """-1e30 for ids that cannot be"""
  highest: Float[Array, 'N']
  """on any device"""
  exponentials: Float[Array, 'N V']
  """of the distance to it"""
  total: Float[Array, 'N']
  """their sum on all devices"""

  @property
  def normalizer(self) -> Float[Array, 'N']:
    """log Z"""
    return self.highest + jnp.log(self.total)

  @property
  def logs(self) -> Float[Array, 'N V']:
    """Logarithms of the probabilities."""
    return self.values - self.normalizer[:, None]

  @property
  def probabilities(self) -> Float[Array, 'N V']:
    """Probabilities."""
    return self.exponentials / self.total[:, None]


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

  def at(self, targets, values, ids):
    """The value of each token's target."""
    return self.over_ids(jnp.where(ids == targets[:, None], values, 0).sum(-1))

  def logits(self, h, w, ids, cap: float, vocab_size: int) -> tuple[Float[Array, 'N V'], _Logits]:
    """Logits with their cap, and the same without ids from `vocab_size` on."""
    soft = capped(jnp.matmul(h, w.T, preferred_element_type=jnp.float32), cap)
    return soft, self.normalized(jnp.where(ids < vocab_size, soft, -1e30))

  def normalized(self, values: Float[Array, 'N V']) -> _Logits:
    """Logits with what makes them probabilities."""
    highest = self.over_ids(values.max(-1), jax.lax.pmax)
    exponentials = jnp.exp(values - highest[:, None])
    return _Logits(values, highest, exponentials, self.over_ids(exponentials.sum(-1)))


class _CrossEntropy(NamedTuple):
  """A loss of tokens; `Head.cross_entropy`."""

  z_loss: float

  def __call__(self, static: _Static, ids, logits: _Logits, inputs, teacher):
    """The loss of each token, the reported one, and a function that returns the gradient of the first with respect to the logits."""
    targets, mask = inputs
    losses = mask * (logits.normalizer - static.at(targets, logits.values, ids))

    def gradient():
      share = mask * (1 + 2 * self.z_loss * logits.normalizer) / logits.total
      return share[:, None] * logits.exponentials - jnp.where(ids == targets[:, None], mask[:, None], 0)

    return losses + mask * self.z_loss * jnp.square(logits.normalizer), losses, gradient


class _Divergence(NamedTuple):
  """The same for `Head.divergence`."""

  reverse: bool
  temperature: float

  def __call__(self, static: _Static, ids, logits: _Logits, inputs, teacher):
    """As that of _CrossEntropy."""
    (targets, mask, taught), scale = inputs, self.temperature
    p = static.logits(taught, teacher.rows, ids, teacher.cap, teacher.vocab_size)[1]
    p = p if scale == 1 else static.normalized(p.values / scale)
    same = scale == 1 and teacher.vocab_size == static.vocab_size
    q = logits if same else static.normalized(jnp.where(ids < teacher.vocab_size, logits.values, -1e30) / scale)
    ahead = jnp.where(ids < teacher.vocab_size, q.logs - p.logs, 0)
    divergence = static.over_ids((q.probabilities * ahead if self.reverse else p.probabilities * -ahead).sum(-1))

    def gradient():
      slope = q.probabilities * (ahead - divergence[:, None]) if self.reverse else q.probabilities - p.probabilities
      return (scale * mask)[:, None] * slope

    return scale**2 * mask * divergence, mask * (logits.normalizer - static.at(targets, logits.values, ids)), gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _summed(hidden, weight, inputs, teacher, static, loss):
  return _sums(hidden, weight, inputs, teacher, static, loss, gradients=False)[:2]


def _summed_forward(hidden, weight, inputs, teacher, static, loss):
  total, metric, dh, dw = _sums(hidden, weight, inputs, teacher, static, loss, gradients=True)
  return (total, metric), (dh, dw, weight)


def _summed_backward(static, loss, saved, cotangents):
  dh, dw, weight = saved
  scale = cotangents[0]
  return (dh * scale).astype(dh.dtype), weight.cotangent(dw * scale), None, None


_summed.defvjp(_summed_forward, _summed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _log_probabilities(hidden, weight, targets, static):
  def local(h, w, targets):
    w, ids = static.rows(w)

    def chunk(_, part):
      h, targets = part
      _, logits = static.logits(h, w, ids, static.cap, static.vocab_size)
      most_likely = static.over_ids(jnp.where(logits.values == logits.highest[:, None], ids, static.vocab_size).min(-1), jax.lax.pmin)
      return None, (static.at(targets, logits.values, ids) - logits.normalizer, most_likely == targets)

    return _in_chunks(chunk, None, (h, targets), 4 * w.shape[0])[1]

  one = PartitionSpec(None)
  run = tensor_shard_map(local, (PartitionSpec(None, None), static.split, one), (one, one))
  return run(all_rows(hidden).astype(static.dtype), weight.read(static.dtype), targets)


def _log_probabilities_backward(static, saved, cotangents):
  hidden, weight, targets = saved
  # They are negative cross-entropies, weighted by their cotangents.
  *_, dh, dw = _sums(hidden, weight, (targets, -cotangents[0]), None, static, _CrossEntropy(0.0), gradients=True)
  return dh, weight.cotangent(dw), None


_log_probabilities.defvjp(lambda *inputs: (_log_probabilities(*inputs), inputs[:3]), _log_probabilities_backward)


def _sums(hidden, weight, inputs, teacher, static, loss, *, gradients):
  """The sums of both losses of `loss` and, if asked for, the gradients of the first with respect to hidden and to the complete W."""
  rows = jax.typeof(hidden).sharding.spec[0]  # split over `model` under sequence parallelism

  def local(h, w, inputs, teacher):
    w, ids = static.rows(w)

    def chunk(sums, part):
      h, inputs = part
      soft, logits = static.logits(h, w, ids, static.cap, static.vocab_size)
      losses, reported, gradient = loss(static, ids, logits, inputs, teacher)
      total, metric = sums[0] + losses.sum(), sums[1] + reported.sum()
      if not gradients:
        return (total, metric), None
      dlogits = gradient()
      dlogits = (dlogits * (1 - jnp.square(soft / static.cap)) if static.cap else dlogits).astype(h.dtype)  # tanh' = 1 - tanh^2
      dw = sums[2] + jnp.einsum('nv,nd->vd', dlogits, h, preferred_element_type=jnp.float32)
      return (total, metric, dw), dlogits @ w

    sums = (jnp.float32(0), jnp.float32(0)) + ((jnp.zeros(w.shape, jnp.float32),) if gradients else ())
    sums, dh = _in_chunks(chunk, sums, (h, inputs), 4 * w.shape[0] * (1 if teacher is None else 2))
    if not gradients:
      return sums
    if static.axis is not None:
      dh = tensor_psum(dh, scattered=rows is not None)
    return *sums[:2], dh, sums[2] if static.transposed else sums[2].T

  one, matrix, table = PartitionSpec(), PartitionSpec(None, None), PartitionSpec(static.axis, None)
  out = (one, one, matrix if static.axis is None else PartitionSpec(rows, None), static.split) if gradients else (one, one)
  specs = matrix, static.split, tuple(PartitionSpec(*(None,) * x.ndim) for x in inputs), jax.tree.map(lambda _: table, teacher)
  run = tensor_shard_map(local, specs, out)
  found = run(all_rows(hidden).astype(static.dtype), weight.read(static.dtype), inputs, teacher)
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
