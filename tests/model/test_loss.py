"""The loss of the head and its gradients are those of numpy, in chunks or not, on every mesh; no device has logits of all ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full
from flax import nnx
from jax.sharding import NamedSharding

from gptjax.config import MeshConfig
from gptjax.model import FixedHead, Head, head
from gptjax.sharding import BATCH_SPEC, batch_shard_map, make_mesh, spec, batch_psum

TOKENS, WIDTH, IDS, TABLE = 48, 16, 29, 32
"""Some rows of the table only pad it."""


def examples(scale=1.0, table=TABLE, tokens=TOKENS):
  """hidden [N, D], head [D, V], targets [N], mask [N]"""
  rng = np.random.default_rng(0)
  return (rng.standard_normal((tokens, WIDTH), np.float32) * scale, rng.standard_normal((WIDTH, table), np.float32),
          rng.integers(0, IDS, tokens, np.int32), (rng.random(tokens) < 0.6).astype(np.float32))


def reference(hidden, head, targets, mask, z_loss, cap=0.0):
  """Both losses and the gradients of the first, in float64."""
  logits = hidden.astype(np.float64) @ head[:, :IDS]
  bent = 1.0
  if cap:
    logits = cap * np.tanh(logits / cap)
    bent = 1 - (logits / cap)**2
  highest = logits.max(-1)
  normalizer = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
  losses = normalizer - logits[np.arange(len(targets)), targets]
  slope = mask[:, None] * ((1 + 2 * z_loss * normalizer[:, None]) * np.exp(logits - normalizer[:, None]) - np.eye(IDS)[targets]) * bent
  padded = np.zeros(head.shape)
  padded[:, :IDS] = hidden.T @ slope
  return ((losses + z_loss * normalizer**2) * mask).sum(), (losses * mask).sum(), slope @ head[:, :IDS].T, padded


def place(mesh, array, *names):
  return jax.device_put(array, NamedSharding(mesh, jax.P(*names)))


def head_of(weight, transposed=False, cap=0.0):
  """A Head of W [D, V], or [V, D] if transposed."""
  vocab = ('vocab', weight.shape[0 if transposed else 1])
  return Head(nnx.Param(weight, axes=(vocab, 'embed') if transposed else ('embed', vocab), dtype='float32'), transposed, IDS, cap)


def on_mesh(mesh, weight, transposed):
  """The head's weight as tensor parallelism splits it."""
  split = head_of(weight, transposed)._static.split
  return place(mesh, weight, *split)


def run(values, mesh, rows=None, z_loss=0.01, transposed=False, cap=0.0):
  """Both losses, and the gradients of the first; `rows`: the mesh axis that splits each device group's rows."""
  hidden, weight, targets, mask = values

  def local(hidden, weight, targets, mask):
    hidden = jax.reshard(hidden, jax.P(rows, None))

    def total(hidden, weight):
      return head_of(weight, transposed, cap).cross_entropy(hidden, targets, mask, z_loss)
    (losses, (dh, dw)) = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, weight)
    assert jax.typeof(dh).sharding.spec == jax.typeof(hidden).sharding.spec
    return batch_psum((losses, total(hidden, weight))), jax.reshard(dh, jax.P(None, None)), batch_psum(dw)

  region = batch_shard_map(local, (BATCH_SPEC, jax.P(), BATCH_SPEC, BATCH_SPEC), (jax.P(), BATCH_SPEC, jax.P()))
  weight = on_mesh(mesh, weight.T if transposed else weight, transposed)
  (with_gradients, without_gradients), dh, dw = jax.jit(region)(
    place(mesh, hidden, *BATCH_SPEC), weight, place(mesh, targets, *BATCH_SPEC), place(mesh, mask, *BATCH_SPEC))
  np.testing.assert_array_equal(with_gradients, without_gradients)
  return *with_gradients, dh, dw.T if transposed else dw


@pytest.mark.parametrize('mesh', [full('1x1'), full('8x1'), '2x4'], indirect=True)
@pytest.mark.parametrize('in_chunks', [False, True])
@pytest.mark.parametrize('transposed, rows, cap', [(False, None, 0.0), (True, 'model', 0.0), (True, None, 2.0)])
def test_losses_and_gradients_are_numpys(transposed, rows, cap, in_chunks, mesh, monkeypatch):
  if in_chunks:
    monkeypatch.setattr(head, 'CHUNK_ROWS', 5)  # divides no device's tokens: the last chunk is filled up
    monkeypatch.setattr(head, 'CHUNK_BYTES', 0)
  values = examples()
  for got, want in zip(run(values, mesh, rows, transposed=transposed, cap=cap), reference(*values, 0.01, cap), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('mesh', [full('1x1'), full('8x1'), '2x4'], indirect=True)
@pytest.mark.parametrize('in_chunks', [False, True])
@pytest.mark.parametrize('transposed, cap, table', [(False, 0.0, TABLE), (True, 2.0, TABLE), (True, 0.0, IDS)])
def test_log_probabilities_their_gradients_and_the_likeliest_ids_are_numpys(transposed, cap, table, in_chunks, mesh, monkeypatch):
  if in_chunks:
    monkeypatch.setattr(head, 'CHUNK_ROWS', 5)
    monkeypatch.setattr(head, 'CHUNK_BYTES', 0)
  hidden, weight, targets, weights = examples(table=table)
  weight[:, 20] = weight[:, 3]  # equally likely on whichever devices they are: the lower one is reported
  logits = hidden.astype(np.float64) @ weight[:, :IDS]
  logits = cap * np.tanh(logits / cap) if cap else logits
  targets = np.where(np.arange(TOKENS) % 2, logits.argmax(-1), targets).astype(np.int32)

  def local(hidden, weight, targets, weights):
    def weighted(hidden, weight):
      found, likeliest = head_of(weight, transposed, cap).log_probabilities(hidden, targets)
      return jnp.sum(found * weights), (found, likeliest)
    (dh, dw), found = jax.grad(weighted, (0, 1), has_aux=True)(hidden, weight)
    return found, dh, batch_psum(dw)

  region = batch_shard_map(local, (BATCH_SPEC, jax.P(), BATCH_SPEC, BATCH_SPEC), (BATCH_SPEC, BATCH_SPEC, jax.P()))
  (got, likeliest), dh, dw = jax.jit(region)(
    place(mesh, hidden, *BATCH_SPEC), on_mesh(mesh, weight.T if transposed else weight, transposed),
    place(mesh, targets, *BATCH_SPEC), place(mesh, weights, *BATCH_SPEC))
  np.testing.assert_allclose(got, (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(TOKENS), targets], 1e-4, 1e-4)
  np.testing.assert_array_equal(likeliest, np.where(logits == np.sort(logits)[:, -1:], np.arange(IDS), IDS).min(-1) == targets)
  *_, expected_dh, expected_dw = reference(hidden, weight, targets, weights, 0.0, cap)  # of the losses, whose sign is the other one
  np.testing.assert_allclose(dh, -expected_dh, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(dw.T if transposed else dw, -expected_dw, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('mesh', [full('1x1'), full('8x1'), '2x4'], indirect=True)
@pytest.mark.parametrize('reverse, temperature, cap, common, in_chunks, transposed', [
  (False, 1.0, 0.0, IDS, False, True), (True, 2.0, 3.0, IDS - 4, True, False), full(False, 0.5, 3.0, IDS - 4, False, True),
  full(True, 1.0, 0.0, IDS, True, True)])
def test_the_divergence_and_its_gradients_are_numpys(reverse, temperature, cap, common, in_chunks, transposed, mesh, monkeypatch):
  if in_chunks:
    monkeypatch.setattr(head, 'CHUNK_ROWS', 5)
    monkeypatch.setattr(head, 'CHUNK_BYTES', 0)
  hidden, weight, targets, mask = examples(0.3)  # small logits, which no float32 has to round
  rng = np.random.default_rng(1)
  taught, rows = rng.standard_normal((TOKENS, 6), np.float32), rng.standard_normal((TABLE, 6), np.float32)

  def local(hidden, weight, targets, mask, taught, rows):
    def total(hidden, weight):
      return head_of(weight, transposed, cap).divergence(
        hidden, targets, mask, FixedHead(rows, common, 2.0), taught, reverse, temperature)
    (losses, (dh, dw)) = jax.value_and_grad(total, (0, 1), has_aux=True)(hidden, weight)
    return batch_psum(losses), dh, batch_psum(dw)

  region = batch_shard_map(local, (BATCH_SPEC, jax.P(), BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, jax.P()), (jax.P(), BATCH_SPEC, jax.P()))
  divided = lambda x: place(mesh, x, *BATCH_SPEC)
  (divergence, entropy), dh, dw = jax.jit(region)(
    divided(hidden), on_mesh(mesh, weight.T if transposed else weight, transposed), divided(targets), divided(mask), divided(taught),
    place(mesh, rows, *spec(('vocab', TABLE), None)))

  bent = lambda logits, cap: cap * np.tanh(logits / cap) if cap else logits
  logits = bent(hidden.astype(np.float64) @ weight[:, :IDS], cap)
  softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
  p = softmax(bent(taught.astype(np.float64) @ rows[:common].T, 2.0) / temperature)
  q = softmax(logits[:, :common] / temperature)
  each = (q * np.log(q / p) if reverse else p * np.log(p / q)).sum(-1)
  slope = np.zeros_like(logits)
  slope[:, :common] = q * (np.log(q / p) - each[:, None]) if reverse else q - p
  slope *= temperature * mask[:, None] * (1 - np.square(logits / cap) if cap else 1)
  np.testing.assert_allclose(divergence, temperature**2 * (each * mask).sum(), rtol=1e-5)
  np.testing.assert_allclose(entropy, (-np.log(softmax(logits)[np.arange(TOKENS), targets]) * mask).sum(), rtol=1e-5)
  np.testing.assert_allclose(dh, slope @ weight[:, :IDS].T, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(np.asarray(dw.T if transposed else dw)[:, :IDS], hidden.T @ slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('mesh', ['2x4'], indirect=True)
def test_a_vocabulary_that_does_not_divide_is_complete_on_every_device(mesh):
  values = examples(table=IDS)
  for got, want in zip(run(values, mesh, 'model'), reference(*values, 0.01), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('mesh', ['1x1', '2x4'], indirect=True)
@pytest.mark.parametrize('scale', [0.01, 1e3])
def test_large_and_small_logits_lose_nothing(scale, mesh):
  values = examples(scale)
  got, want = run(values, mesh, z_loss=0.0), reference(*values, 0.0)
  assert got[0] == got[1]
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(got[2], want[2], rtol=1e-4, atol=1e-4)


def test_masked_targets_have_no_effect(one_device):
  hidden, weight, targets, mask = examples()
  other = np.where(mask == 0, 5, targets).astype(np.int32)
  for a, b in zip(run((hidden, weight, targets, mask), one_device), run((hidden, weight, other, mask), one_device), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('transposed', [False, True])
def test_logits_of_a_large_vocabulary_take_little_memory(transposed, one_device):
  # 8,192 tokens and 128 * 1,024 ids: the logits alone would be 4 GiB. Nothing is run.
  tokens, ids, width = 8192, 128 * 1024, 256

  def gradients(hidden, weight, targets, mask):
    def total(hidden, weight):
      vocab = ('vocab', ids)
      param = nnx.Param(weight, axes=(vocab, 'embed') if transposed else ('embed', vocab), dtype='float32')
      return Head(param, transposed, ids).cross_entropy(hidden, targets, mask, 1e-4)[0]
    return jax.grad(total, (0, 1))(hidden, weight)

  shapes = (tokens, width), (ids, width) if transposed else (width, ids), (tokens,), (tokens,)
  dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
  arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(one_device, jax.P(*[None] * len(shape))))
            for shape, dtype in zip(shapes, dtypes, strict=True)]
  memory = jax.jit(gradients).lower(*arrays).compile().memory_analysis()
  head = 4 * ids * width
  assert memory.output_size_in_bytes >= head
  # The head's gradient is an output; where it is a temporary as well, it is known and left out.
  share = max(memory.temp_size_in_bytes - head, 0) / (4 * tokens * ids)
  print(f'share of the logits: {share:.4f}')
  assert share < 0.1


def test_the_parts_of_the_vocabulary_are_never_gathered():
  with jax.set_mesh(mesh := make_mesh(MeshConfig(1, 8))):
    values = examples(table=64 * 8, tokens=512)
    hidden, weight, targets, mask = values
    total = lambda h, w, t, m: head_of(w).cross_entropy(h, t, m)[0]
    weight = on_mesh(mesh, weight, False)
    text = jax.jit(jax.grad(total, (0, 1))).lower(hidden, weight, targets, mask).compile().as_text()
    assert '512,64' in text and '512,512' not in text and spec('vocab')[0] == 'model'
