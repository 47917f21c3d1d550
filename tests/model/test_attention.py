"""Attention against plain numpy, in blocks and in one square, and what rotary positions and dropout promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full

from gptjax.config import ComputeConfig, ModelConfig, RopeConfig, UserError
from gptjax.model import Positions, abstract_model, attention_backend, kernels
from gptjax.model.attention import BLOCK, PARTS, attend, causal_attention, frequencies, rotate
from gptjax.model.kernels import LANES, ScoreConfig, cudnn, splash
from gptjax.model.layers import keep_weights, weight_keys
from gptjax.sharding import batch_shard_map

pytestmark = pytest.mark.usefixtures('one_device')


def draw(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def as_heads(*arrays):
  """Arrays [B, H, T, C] with the sharding that they have in a model."""
  return tuple(jax.device_put(array, jax.P(None, 'model', None, None)) for array in arrays)


PLAIN = ScoreConfig(8 ** -0.5)


def plain_attention(score, q, k, v, segments):
  """One head, one query after the other, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros_like(q)
  group = q.shape[1] // k.shape[1]
  for b, h, t in np.ndindex(q.shape[:3]):
    oldest = max(0, t + 1 - score.window) if score.window else 0
    seen = [s for s in range(oldest, t + 1) if segments[b, s] == segments[b, t]]
    scores = k[b, h // group, seen] @ q[b, h, t] * score.scale
    scores = score.cap * np.tanh(scores / score.cap) if score.cap else scores
    weights = np.exp(scores - scores.max())
    out[b, h, t] = weights @ v[b, h // group, seen] / weights.sum()
  return out


@pytest.mark.parametrize('length, key_heads, score', [
    (BLOCK - 1, 1, PLAIN), full(BLOCK, 4, PLAIN), (2 * BLOCK + 2, 2, PLAIN),
    (PARTS * BLOCK + 3, 2, PLAIN),  # more blocks than parts: they run one after the other, and the last is short
    full(2 * BLOCK + 2, 2, ScoreConfig(0.5, cap=1.5)), full(2 * BLOCK + 2, 2, ScoreConfig(0.5, window=1)),
    full(5 * BLOCK + 3, 2, ScoreConfig(0.5, window=BLOCK)), (5 * BLOCK + 3, 4, ScoreConfig(0.5, 2.0, BLOCK // 2 + 1)),
    full(5 * BLOCK, 2, ScoreConfig(0.5, window=3 * BLOCK)), (PARTS * BLOCK + 3, 2, ScoreConfig(0.5, window=2 * BLOCK + 5)),
    full(2 * BLOCK, 2, ScoreConfig(0.5, window=3 * BLOCK))])
def test_blocks_equal_the_square_and_the_formula(length, key_heads, score):
  q, k, v = draw(0, 2, 4, length, 8), draw(1, 2, key_heads, length, 8), draw(2, 2, key_heads, length, 8)
  segments = np.sort(np.random.default_rng(3).integers(0, 3, (2, length)), 1)
  weights = draw(4, *q.shape)

  @jax.jit
  def run(q, k, v, segments):
    def attended(rows):
      def total(q, k, v):
        out = causal_attention(score, q, k, v, segments, 0.0, None, rows)
        return jnp.sum(out * weights), out
      return jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return attended(BLOCK), attended(length)

  (gradients, out), (square_gradients, square) = run(*as_heads(q, k, v), segments)
  np.testing.assert_allclose(out, plain_attention(score, q, k, v, segments), 1e-4, 1e-5)
  np.testing.assert_allclose(out, square, 1e-5, 1e-6)
  for gradient, expected in zip(gradients, square_gradients, strict=True):
    np.testing.assert_allclose(gradient, expected, 1e-4, 1e-5)


@pytest.mark.parametrize('length, expected', [full(1024, 0.0), (4096, 4.0)])
def test_memory_grows_with_the_context_and_not_with_its_square(length, expected):
  """Temporaries of the gradient, over those of a context of 1,024."""
  def temporaries(length):
    total = lambda q, k, v: jnp.sum(causal_attention(PLAIN, q, k, v, None, 0.0, None, BLOCK))
    arrays = as_heads(*(np.zeros((1, 2, length, 8), np.float32) for _ in range(3)))
    return jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes
  assert temporaries(length) < max(expected * 1.3 * temporaries(1024), 1024 * 1024 * 2 * 4)


KERNELS = [(False, True), (True, False), (True, True), (False, False)]
BOTH = ScoreConfig(0.3, 2.0, LANES + 5)
SCORES = [(1, PLAIN), (2, PLAIN), (4, PLAIN), (2, ScoreConfig(0.3, cap=2.0)), (2, ScoreConfig(0.3, window=60)), (4, BOTH)]
FEW = [(2, PLAIN, False, True), (4, BOTH, True, False)]


@pytest.mark.parametrize('key_heads, score, segmented, fused', [
    *FEW, *(full(*one) for one in (score + kernel for score in SCORES for kernel in KERNELS) if one not in FEW)])
def test_splash_kernels_equal_the_square(key_heads, score, segmented, fused, monkeypatch):
  length = 2 * LANES
  monkeypatch.setattr(kernels, 'MAX_FUSED', length if fused else 0)
  q, k, v = (draw(seed, 2, heads, length, 32) for seed, heads in enumerate((4, key_heads, key_heads)))
  segments = np.sort(np.random.default_rng(3).integers(0, 3, (2, length)), 1).astype(np.int32)
  segments = jnp.asarray(segments) if segmented else None
  weights = draw(4, *q.shape)

  def run(attend):
    total = lambda q, k, v: (lambda out: (jnp.sum(out * weights), out))(attend(q, k, v))
    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*as_heads(q, k, v))

  # Pallas kernels run where all axes are manual, as they are in a step.
  kernel = lambda q, k, v: splash(score, q, k, v, segments, interpret=True)
  gradients, out = run(batch_shard_map(kernel, (jax.P(), jax.P(), jax.P()), jax.P()))
  expected_gradients, expected = run(lambda q, k, v: causal_attention(score, q, k, v, segments, 0.0, None, length))
  np.testing.assert_allclose(out, expected, 1e-4, 1e-5)
  for gradient, want in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(gradient, want, 1e-3, 1e-4)


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason="cuDNN's attention runs on NVIDIA GPUs")
@pytest.mark.parametrize('segmented', [False, True])
@pytest.mark.parametrize('score', [PLAIN, ScoreConfig(0.1, window=60)], ids=str)
def test_cudnn_equals_the_square(score, segmented):
  q, k, v = (jnp.asarray(draw(seed, 2, heads, 256, 64), jnp.bfloat16) for seed, heads in enumerate((4, 2, 2)))
  segments = jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 3, (2, 256)), 1), jnp.int32) if segmented else None
  exact = causal_attention(score, *(x.astype(jnp.float32) for x in (q, k, v)), segments, 0.0, None, 256)
  np.testing.assert_allclose(cudnn(score, q, k, v, segments).astype(jnp.float32), exact, 3e-2, 3e-2)


HALF = {'dtype': 'bfloat16'}


@pytest.mark.parametrize('platform, model, compute, context, expected', [
    ('cpu', {}, {}, 256, 'blocks'), ('cpu', {}, {'attention': 'xla'}, 256, 'xla'), ('tpu', {}, {}, 256, 'splash'),
    ('tpu', {}, {}, 200, 'blocks'), ('tpu', {'dropout': 0.1}, {}, 256, 'blocks'), ('gpu', {}, HALF, 200, 'cudnn'),
    ('gpu', {}, HALF, 201, 'blocks'), ('gpu', {'width': 48, 'heads': 4}, HALF, 200, 'blocks'), ('gpu', {}, {}, 256, 'blocks'),
    ('gpu', {'dropout': 0.1}, HALF, 256, 'blocks'), ('gpu', {}, HALF | {'attention': 'xla'}, 256, 'xla'),
])
def test_auto_is_the_devices_own_kernel_where_it_can_be(platform, model, compute, context, expected):
  assert attention_backend(ModelConfig(**model), ComputeConfig(**compute), context, platform) == expected


@pytest.mark.parametrize('platform, compute, context, expected', [
    ('cpu', {'attention': 'splash'}, 256, 'auto, blocks, xla on a cpu'),
    ('gpu', {'attention': 'splash'}, 256, 'auto, blocks, xla, cudnn on a gpu'),
    ('tpu', {'attention': 'splash'}, 200, 'auto, blocks or xla: it needs a context of a multiple of 128 (it is 200)'),
    ('gpu', {'attention': 'cudnn'}, 256, "auto, blocks or xla: it needs bfloat16, and compute.dtype is 'float32'"),
])
def test_a_kernel_that_cannot_run_is_refused(platform, compute, context, expected):
  with pytest.raises(UserError) as caught:
    attention_backend(ModelConfig(), ComputeConfig(**compute), context, platform)
  assert str(caught.value) == f"compute.attention: '{compute['attention']}', expected: {expected}"


def test_a_kernel_without_dropout_is_refused_with_dropout():
  with pytest.raises(UserError, match='it needs no dropout, and model.dropout is 0.1$'):
    attention_backend(ModelConfig(dropout=0.1), ComputeConfig(attention='splash'), 256, 'tpu')


def test_rotary_turns_pairs_of_features_by_position_times_frequency():
  x, positions, theta = draw(5, 2, 3, 7, 8), np.random.default_rng(6).integers(0, 50, (2, 7)), 100.0
  frequency = theta ** -(np.arange(4) / 4)
  turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, None, :, None] * frequency)
  expected = np.concatenate([turned.real, turned.imag], -1)
  np.testing.assert_allclose(rotate(jnp.asarray(x), jnp.asarray(positions), frequencies(RopeConfig(theta), 4, False)), expected, 1e-4, 1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
  q, k = (jnp.asarray(draw(seed, 1, 1, 1, 16)) for seed in (7, 8))

  def score(here, there):
    turn = lambda x, position: rotate(x, jnp.full((1, 1), position), frequencies(RopeConfig(), 8, False))
    return jnp.sum(turn(q, here) * turn(k, there))

  for distance in (0, 1, 10):
    near = score(distance, 0)
    np.testing.assert_allclose(score(distance + 200, 200), near, 1e-3, 1e-4)
    assert abs(score(distance + 1, 0) - near) > 1e-2


def test_moving_a_text_changes_logits_with_learned_positions_alone(style, random_parameters):
  described = abstract_model(style, ComputeConfig(), 32)
  logits = jax.jit(described.merge(random_parameters(described)).__call__)
  tokens = jnp.asarray(np.random.default_rng(9).integers(0, 50, (1, 16)))
  here, moved = logits(tokens, Positions(jnp.arange(16)[None])), logits(tokens, Positions(jnp.arange(16)[None] + 16))
  difference = np.abs(here - moved).max()
  assert difference < 1e-4 if style.positions == 'rope' else difference > 0.1


def test_dropped_attention_weights_differ_by_row_head_and_block_and_average_out():
  length, heads, rows, rate = 72, 4, 24, 0.5
  shape = (2, heads, length, length)
  values = np.broadcast_to(np.eye(length, dtype=np.float32), shape)  # so that the outputs are the weights
  zeros, values = as_heads(np.zeros(shape, np.float32), values)
  run = jax.jit(lambda key: causal_attention(PLAIN, zeros, zeros, values, None, rate, jax.random.split(key, 2), rows))
  weights = np.asarray(run(jax.random.key(0)))
  uniform = np.tri(length) / np.arange(1, length + 1)[:, None]
  np.testing.assert_allclose(weights, np.where(weights > 0, uniform / (1 - rate), 0), 1e-5)
  kept = (weights > 0)[:, :, rows:, :rows]  # what the later blocks keep of keys that all of them see
  assert abs(kept.mean() - (1 - rate)) < 0.02
  assert len({row.tobytes() for row in np.concatenate(np.concatenate(kept))}) == 2 * (length - rows) * heads
  np.testing.assert_array_equal(run(jax.random.key(0)), weights)
  assert (np.asarray(run(jax.random.key(1))) != weights).any()
  mean = np.mean([run(jax.random.key(seed)) for seed in range(100)], 0)
  np.testing.assert_allclose(mean.sum(-1).mean((0, 1)), 1, atol=0.15)


def test_kept_weights_are_independent_of_those_beside_them():
  rate = 0.1
  keys = weight_keys(rate, jax.random.split(jax.random.key(0), 4), jnp.arange(8).reshape(4, 2), jnp.arange(128))
  score = (np.asarray(keep_weights(rate, keys, jnp.arange(256))) - (1 - rate)) / np.sqrt(rate * (1 - rate))
  within = lambda products: abs(products.mean()) * np.sqrt(products.size) < 4  # standard deviations
  assert within(score)
  for axis in range(score.ndim):
    for distance in (1, 2, 3, 64):
      if distance < score.shape[axis]:
        pair = np.split(score, [distance], axis)[1], np.split(score, [score.shape[axis] - distance], axis)[0]
        assert within(pair[0] * pair[1]), (axis, distance)


def test_dropped_weights_are_the_same_where_keys_are_repeated_for_each_head():
  q, k, v = as_heads(draw(0, 2, 4, 72, 8), draw(1, 2, 2, 72, 8), draw(2, 2, 2, 72, 8))
  run = jax.jit(lambda k, v: causal_attention(PLAIN, q, k, v, None, 0.5, jax.random.split(jax.random.key(0), 2), 24))
  repeated = as_heads(*(np.repeat(np.asarray(x), 2, 1) for x in (k, v)))
  np.testing.assert_allclose(run(k, v), run(*repeated), 1e-5, 1e-6)


def test_gradients_with_dropped_weights_are_those_of_the_formula():
  (queries, keys), rate = (5, 7), 0.4
  shapes = (3, queries, 8), (keys, 8), (keys, 8), (3, queries, 8)
  q, k, v, weights = (jnp.asarray(draw(seed, 2, 2, *shape)) for seed, shape in enumerate(shapes))
  mask = jnp.tri(queries, keys, 2, bool)[None]
  dropped = weight_keys(rate, jax.random.split(jax.random.key(0), 2), jnp.arange(6).reshape(2, 3), jnp.arange(queries))
  drawn = keep_weights(rate, dropped, jnp.arange(keys))
  run = lambda q, k, v: attend(PLAIN, q, k, v, mask, drawn, rate)
  kept = jnp.moveaxis(drawn, 2, 4)

  def formula(q, k, v):
    scores = jnp.where(mask[:, None, None], jnp.einsum('bkgtc,bksc->bkgts', q, k) * PLAIN.scale, -jnp.inf)
    return jnp.einsum('bkgts,bksc->bkgtc', jnp.where(kept, jax.nn.softmax(scores) / (1 - rate), 0), v)

  assert 0.2 < kept.mean() < 0.9
  gradients = [jax.jit(jax.grad(lambda *inputs: jnp.sum(function(*inputs) * weights), (0, 1, 2)))(q, k, v) for function in (run, formula)]
  for gradient, expected in zip(*gradients, strict=True):
    np.testing.assert_allclose(gradient, expected, 1e-4, 1e-5)
