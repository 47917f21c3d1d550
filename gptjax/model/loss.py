"""The loss of the output head, without the logits of a whole batch, and with the vocabulary split over `model`."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gptjax.model.layers import capped
from gptjax.model.weights import axes_of, by_hand, given_back, home, read, summed
from gptjax.sharding import RULES, spec

CHUNK_BYTES = 2**27
"""Of a chunk's float32 logits, on a device. Every chunk reads and writes the gradient of the whole head, so it shall not be small:"""

CHUNK_ROWS = 256
"""at least so many tokens."""


def cross_entropy(hidden: Float[Array, 'N D'], head: nnx.Param, targets: Int[Array, 'N'], mask: Float[Array, 'N'], vocab_size: int,
                  z_loss: float = 0.0, transposed: bool = False, cap: float = 0.0) -> tuple[Float[Array, ''], Float[Array, '']]:
  """The sum over tokens of mask * -log softmax(hidden W)[target], in nats, with and without its z-loss.

  Logits are made for a chunk of tokens at a time, and used up at once for the loss and, in the same go, for both gradients: a
  product is never done twice, and a chunk's logits are all that there ever is. Each device has its part of the ids (Megatron's
  vocabulary-parallel cross-entropy, arXiv:1909.08053, section 3); maxima and sums over them cross `model`.

  Args:
    hidden: what the head reads.
    head: W [D, V], or [V, D] if transposed.
    targets: an id a token.
    mask: weight of each token.
    vocab_size: ids from here on pad the table and have no probability.
    z_loss: weight of log(Z)^2 (arXiv:2204.02311, section 5).
    transposed: see head.
    cap: soft bound of the logits; 0: none.

  Returns:
    (loss with the z-loss, loss without it); gradients flow through the first.
  """
  static = head.get_metadata('dtype'), spec(*axes_of(head)), vocab_size, z_loss, cap, transposed
  total, loss = _cross_entropy(hidden, head.get_value(), targets, mask, *static)
  return total, jax.lax.stop_gradient(loss)


def log_probabilities(hidden: Float[Array, 'N D'], head: nnx.Param, targets: Int[Array, 'N'], vocab_size: int, transposed: bool = False,
                      cap: float = 0.0) -> tuple[Float[Array, 'N'], Bool[Array, 'N']]:
  """log softmax(hidden W)[target] of each token, in nats, and whether its target is the likeliest id (of equal ones the lowest).

  The arguments are those of `cross_entropy`; so are the chunks and the split vocabulary. Has no gradients.
  """
  place, batch = spec(*axes_of(head)), PartitionSpec(RULES['batch'])
  axis = place[0 if transposed else 1]
  dtype = head.get_metadata('dtype')

  def local(h, w, targets):
    w = w if transposed else w.T  # [V, D]
    ids = _ids(w, axis)

    def chunk(_, part):
      h, targets = part
      logits, highest, exponentials = _logits(h, w, ids, vocab_size, cap, axis)[1:]
      own = _everywhere(jnp.where(ids == targets[:, None], logits, 0).sum(-1), axis)
      likeliest = jnp.where(logits == highest[:, None], ids, vocab_size).min(-1)
      likeliest = likeliest if axis is None else jax.lax.pmin(likeliest, axis)
      return None, (own - highest - jnp.log(_everywhere(exponentials.sum(-1), axis)), likeliest == targets)

    return _in_chunks(chunk, None, (h, targets), 4 * w.shape[0])[1]

  h = jax.reshard(hidden, PartitionSpec(*batch, None))
  return by_hand(local, in_specs=(PartitionSpec(*batch, None), place, batch), out_specs=(batch, batch))(
    h.astype(dtype), read(head.get_value(), dtype, place), targets)


def _ids(w, axis):
  """Ids [v] of this device's rows of W [v, D]."""
  return (0 if axis is None else jax.lax.axis_index(axis) * w.shape[0]) + jnp.arange(w.shape[0])


def _everywhere(x, axis):
  """The sum of x over the devices that share out the ids."""
  return x if axis is None else jax.lax.psum(x, axis)


def _logits(h, w, ids, vocab_size, cap, axis):
  """Of this device's ids: logits [n, v] with their cap, those with -1e30 for ids that pad the table, the highest [n] on any device,
  and exponentials [n, v] of the distance to it."""
  soft = capped(jnp.matmul(h, w.T, preferred_element_type=jnp.float32), cap)
  logits = jnp.where(ids < vocab_size, soft, -1e30)
  highest = logits.max(-1)
  highest = highest if axis is None else jax.lax.pmax(highest, axis)
  return soft, logits, highest, jnp.exp(logits - highest[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8, 9))
def _cross_entropy(hidden, weight, targets, mask, *static):
  return _pass(hidden, weight, targets, mask, *static, gradients=False)[:2]


def _forward(hidden, weight, targets, mask, *static):
  total, loss, dh, dw = _pass(hidden, weight, targets, mask, *static, gradients=True)
  return (total, loss), (dh, dw, weight)


def _backward(*inputs):
  (dh, dw, weight), (scale, _) = inputs[-2:]
  return (dh * scale).astype(dh.dtype), given_back(weight, dw * scale), None, None


_cross_entropy.defvjp(_forward, _backward)


def _pass(hidden, weight, targets, mask, dtype, place, vocab_size, z_loss, cap, transposed, *, gradients):
  """Both losses, and the gradients of the first with respect to hidden and weight if asked for."""
  vocab = 0 if transposed else 1
  axis, tokens = place[vocab], jax.typeof(hidden).sharding.spec[0]
  w, batch = read(weight, dtype, place), PartitionSpec(RULES['batch'])

  def local(h, w, targets, mask):
    w = w if transposed else w.T  # [V, D]
    ids = _ids(w, axis)

    def chunk(sums, part):
      h, targets, mask = part
      soft, logits, highest, exponentials = _logits(h, w, ids, vocab_size, cap, axis)
      total = _everywhere(exponentials.sum(-1), axis)
      hit = ids == targets[:, None]
      normalizer = highest + jnp.log(total)
      losses = mask * (normalizer - _everywhere(jnp.where(hit, logits, 0).sum(-1), axis))
      z = mask * z_loss * jnp.square(normalizer)
      loss, extra = sums[0] + losses.sum(), sums[1] + z.sum()
      if not gradients:
        return (loss, extra), None
      share = mask * (1 + 2 * z_loss * normalizer) / total
      dlogits = share[:, None] * exponentials - jnp.where(hit, mask[:, None], 0)
      dlogits = (dlogits * (1 - jnp.square(soft / cap)) if cap else dlogits).astype(h.dtype)  # tanh' = 1 - tanh^2
      dw = sums[2] + jnp.einsum('nv,nd->vd', dlogits, h, preferred_element_type=jnp.float32)
      return (loss, extra, dw), dlogits @ w

    sums = (jnp.float32(0), jnp.float32(0)) + ((jnp.zeros(w.shape, jnp.float32),) if gradients else ())
    sums, dh = _in_chunks(chunk, sums, (h, targets, mask), 4 * w.shape[0])
    loss, z = (jax.lax.psum(x, RULES['batch']) for x in sums[:2])
    if not gradients:
      return loss + z, loss
    if axis is not None:
      dh = summed(dh, PartitionSpec(axis if axis in tokens else None), (axis,))
    dw = sums[2] if transposed else sums[2].T
    return loss + z, loss, dh, summed(dw, home(weight), RULES['batch'])

  one = PartitionSpec()
  out = (one, one, PartitionSpec(tokens if axis is not None else RULES['batch'], None), home(weight)) if gradients else (one, one)
  h = jax.reshard(hidden, PartitionSpec(*batch, None))
  found = by_hand(local, in_specs=(PartitionSpec(*batch, None), place, batch, batch), out_specs=out)(h.astype(dtype), w, targets, mask)
  if gradients:
    found = *found[:2], jax.reshard(found[2], jax.typeof(hidden).sharding.spec).astype(hidden.dtype), found[3]
  return found


def _in_chunks(chunk, sums, inputs, row_bytes):
  """Runs chunk(sums, part) over parts of the inputs' rows, a few at a time; returns the sums and all rows of its results."""
  rows = inputs[0].shape[0]
  size = max(CHUNK_ROWS, CHUNK_BYTES // row_bytes)
  if rows <= size:
    return chunk(sums, inputs)
  count = -(-rows // size)
  size = -(-rows // count)
  filled = count * size - rows  # what is added has no weight
  parts = jax.tree.map(lambda x: jnp.pad(x, [(0, filled)] + [(0, 0)] * (x.ndim - 1)).reshape(count, size, *x.shape[1:]), inputs)
  sums, results = jax.lax.scan(chunk, sums, parts)
  return sums, jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:])[:rows], results)
