"""The loss of the head and its gradients are what numpy says, in chunks or not, on every mesh; logits are never whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full
from flax import nnx
from jax.sharding import NamedSharding

from gptjax.config import MeshConfig
from gptjax.model import cross_entropy, log_probabilities, loss
from gptjax.sharding import make_mesh, place, spec

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


def run(values, mesh, rows='batch', z_loss=0.01, transposed=False, cap=0.0):
  hidden, head, targets, mask = values
  vocab = ('vocab', head.shape[1])
  axes = (vocab, 'embed') if transposed else ('embed', vocab)

  def total(hidden, weight, targets, mask):
    head = nnx.Param(weight, axes=axes, dtype='float32')
    return cross_entropy(hidden, head, targets, mask, IDS, z_loss, transposed, cap)

  placed = (place(mesh, hidden, rows, 'embed'), place(mesh, head.T if transposed else head, *axes),
            place(mesh, targets, 'batch'), place(mesh, mask, 'batch'))
  (with_z, without), (dh, dw) = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(*placed)
  assert jax.typeof(dh).sharding.spec == jax.typeof(placed[0]).sharding.spec
  np.testing.assert_array_equal(jax.jit(total)(*placed), (with_z, without))  # without gradients the same
  return with_z, without, dh, dw.T if transposed else dw


@pytest.mark.parametrize('mesh', [full('1x1'), full('8x1'), '2x4'], indirect=True)
@pytest.mark.parametrize('in_chunks', [False, True])
@pytest.mark.parametrize('transposed, rows, cap', [(False, 'batch', 0.0), (True, 'tokens', 0.0), (True, 'batch', 2.0)])
def test_losses_and_gradients_are_numpys(transposed, rows, cap, in_chunks, mesh, monkeypatch):
  if in_chunks:
    monkeypatch.setattr(loss, 'CHUNK_ROWS', 5)  # divides no device's tokens: the last chunk is filled up
    monkeypatch.setattr(loss, 'CHUNK_BYTES', 0)
  values = examples()
  for got, want in zip(run(values, mesh, rows, transposed=transposed, cap=cap), reference(*values, 0.01, cap), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('mesh', [full('1x1'), full('8x1'), '2x4'], indirect=True)
@pytest.mark.parametrize('in_chunks', [False, True])
@pytest.mark.parametrize('transposed, cap, table', [(False, 0.0, TABLE), (True, 2.0, TABLE), (True, 0.0, IDS)])
def test_log_probabilities_and_the_likeliest_ids_are_numpys(transposed, cap, table, in_chunks, mesh, monkeypatch):
  if in_chunks:
    monkeypatch.setattr(loss, 'CHUNK_ROWS', 5)
    monkeypatch.setattr(loss, 'CHUNK_BYTES', 0)
  hidden, head, targets, _ = examples(table=table)
  head[:, 20] = head[:, 3]  # equally likely wherever they lie: the lower one it is
  logits = hidden.astype(np.float64) @ head[:, :IDS]
  logits = cap * np.tanh(logits / cap) if cap else logits
  targets = np.where(np.arange(TOKENS) % 2, logits.argmax(-1), targets).astype(np.int32)
  axes = (('vocab', table), 'embed') if transposed else ('embed', ('vocab', table))

  @jax.jit
  def run(hidden, weight, targets):
    return log_probabilities(hidden, nnx.Param(weight, axes=axes, dtype='float32'), targets, IDS, transposed, cap)

  weight = place(mesh, head.T if transposed else head, *axes)
  got, likeliest = run(place(mesh, hidden, 'batch', 'embed'), weight, place(mesh, targets, 'batch'))
  np.testing.assert_allclose(got, (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(TOKENS), targets], 1e-4, 1e-4)
  np.testing.assert_array_equal(likeliest, np.where(logits == np.sort(logits)[:, -1:], np.arange(IDS), IDS).min(-1) == targets)


@pytest.mark.parametrize('mesh', ['2x4'], indirect=True)
def test_a_vocabulary_that_does_not_divide_is_whole_everywhere(mesh):
  values = examples(table=IDS)
  for got, want in zip(run(values, mesh, 'tokens'), reference(*values, 0.01), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('mesh', ['1x1', '2x4'], indirect=True)
@pytest.mark.parametrize('scale', [0.01, 1e3])
def test_large_and_small_logits_lose_nothing(scale, mesh):
  values = examples(scale)
  got, want = run(values, mesh, z_loss=0.0), reference(*values, 0.0)
  assert got[0] == got[1]
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(got[2], want[2], rtol=1e-4, atol=1e-4)


def test_targets_that_do_not_count_have_no_say(one_device):
  hidden, head, targets, mask = examples()
  other = np.where(mask == 0, 5, targets).astype(np.int32)
  for a, b in zip(run((hidden, head, targets, mask), one_device), run((hidden, head, other, mask), one_device), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('transposed', [False, True])
def test_logits_of_a_large_vocabulary_take_little_memory(transposed, one_device):
  # 8,192 tokens and 128 * 1,024 ids: the logits alone would be 4 GiB. Nothing is run.
  tokens, ids, width = 8192, 128 * 1024, 256

  def gradients(hidden, weight, targets, mask):
    head = nnx.Param(weight, axes=('vocab', 'embed') if transposed else ('embed', 'vocab'), dtype='float32')
    return jax.grad(lambda h, w: cross_entropy(h, nnx.Param(w, **head.get_metadata()), targets, mask, ids, 1e-4, transposed)[0],
                    (0, 1))(hidden, weight)

  shapes = (tokens, width), (ids, width) if transposed else (width, ids), (tokens,), (tokens,)
  dtypes, axes = (jnp.float32, jnp.float32, jnp.int32, jnp.float32), (('batch', None), (None, None), ('batch',), ('batch',))
  arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(one_device, spec(*names)))
            for shape, dtype, names in zip(shapes, dtypes, axes, strict=True)]
  memory = jax.jit(gradients).lower(*arrays).compile().memory_analysis()
  head = 4 * ids * width
  assert memory.output_size_in_bytes >= head
  # The head's gradient is an output; where it is a temporary as well, it is known and left out.
  share = max(memory.temp_size_in_bytes - head, 0) / (4 * tokens * ids)
  print(f'share of the logits: {share:.4f}')
  assert share < 0.1


def test_the_parts_of_the_vocabulary_are_never_joined():
  with jax.set_mesh(mesh := make_mesh(MeshConfig(1, 8))):
    values = examples(table=64 * 8, tokens=512)
    hidden, head, targets, mask = values
    arrays = (place(mesh, hidden, 'batch', 'embed'), place(mesh, head, 'embed', 'vocab'), place(mesh, targets, 'batch'),
              place(mesh, mask, 'batch'))
    total = lambda h, w, t, m: cross_entropy(h, nnx.Param(w, axes=('embed', 'vocab'), dtype='float32'), t, m, IDS)[0]
    text = jax.jit(jax.grad(total, (0, 1))).lower(*arrays).compile().as_text()
    assert '512,64' in text and '512,512' not in text and spec('vocab')[0] == 'model'
