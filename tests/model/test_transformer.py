"""What a transformer must be, whatever its style: causal, blind to other documents, the same however it is run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full

from gptjax.config import ComputeConfig
from gptjax.model import Positions, abstract_model, empty_cache, stack_layers
from gptjax.training import next_token

pytestmark = pytest.mark.usefixtures('one_device')


def ids(seed, *shape):
  return np.random.default_rng(seed).integers(0, 50, shape, np.int32)


def loss_and_gradients(described, parameters, tokens, key=None):
  """The mean next-token loss and its gradients, as numpy arrays."""
  batch = {'tokens': jnp.asarray(tokens[:, :-1]), 'targets': jnp.asarray(tokens[:, 1:])}
  batch['mask'] = jnp.ones(batch['targets'].shape)

  @jax.jit
  @jax.value_and_grad
  def loss(parameters, batch, keys):
    model = described.merge(parameters)
    found = next_token()(model.head, model.hidden(batch['tokens'], keys=keys)[0], batch)
    return found.loss / found.targets

  return jax.tree.map(np.asarray, loss(parameters, batch, key))


def assert_close(a, b, rtol=1e-5, atol=1e-6):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol, atol)


@pytest.mark.parametrize('attention', ['blocks', full('xla')])
def test_a_position_depends_on_itself_and_the_past_alone(style, attention, random_parameters):
  # The gradient of each position's logits by each position's input vector: exactly zero where the input is later.
  length = 70  # more than one block of queries
  described = abstract_model(dataclasses.replace(style, vocab_size=length), ComputeConfig(attention=attention), length)
  parameters = random_parameters(described)
  # Every input vector is a row of its own: of the positions' table, or of the tokens' where each token occurs once.
  table = 'positions/table' if style.positions == 'learned' else 'tokens/table'
  tokens = np.random.default_rng(1).permutation(length).astype(np.int32)
  rows = np.arange(length) if style.positions == 'learned' else tokens

  direction = np.random.default_rng(2).standard_normal(described.config.table_rows, np.float32)
  direction[length:] = 0  # padded ids

  @jax.jit
  def gradient(parameters, tokens, at):
    dot = lambda vectors: jnp.sum(described.merge(parameters | {table: vectors})(tokens[None]) * at[:, None] * direction)
    return jnp.abs(jax.grad(dot)(parameters[table])).max(-1)

  seen = np.stack([np.asarray(gradient(parameters, tokens, at))[rows] for at in np.eye(length, dtype=np.float32)])
  np.testing.assert_array_equal(seen > 0, np.tri(length, dtype=bool))


@pytest.mark.parametrize('style', [full('modern'), 'gpt2'], indirect=True)
def test_a_document_gets_the_logits_it_gets_alone(style, random_parameters):
  first, second = 50, 40
  described = abstract_model(style, ComputeConfig(), first + second)
  parameters = random_parameters(described)
  logits = jax.jit(lambda parameters, tokens, place: described.merge(parameters)(tokens, place))
  positions = jnp.concatenate([jnp.arange(first), jnp.arange(second)])[None]
  segments = jnp.repeat(jnp.array([1, 2]), jnp.array([first, second]), total_repeat_length=first + second)[None]
  place = Positions(positions, segments)
  tokens = ids(2, 1, first + second)
  together = logits(parameters, tokens, place)

  alone = [logits(parameters, part, None) for part in (tokens[:, :first], tokens[:, first:])]
  np.testing.assert_allclose(together, np.concatenate(alone, 1), 1e-5, 1e-5)
  # To the last bit: what stands in the other document changes nothing.
  for here, there in ((slice(first, None), slice(None, first)), (slice(None, first), slice(first, None))):
    other = tokens.copy()
    other[:, there] = ids(3, *other[:, there].shape)
    np.testing.assert_array_equal(logits(parameters, other, place)[:, here], together[:, here])


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
def test_without_segments_the_earlier_document_is_seen(style, random_parameters):
  described = abstract_model(style, ComputeConfig(), 8)
  parameters = random_parameters(described)
  logits = jax.jit(lambda parameters, tokens: described.merge(parameters)(tokens))
  tokens = ids(4, 1, 8)
  assert np.abs(logits(parameters, tokens) - logits(parameters, np.roll(tokens, 1)))[0, -1].max() > 1e-2


def test_attention_in_blocks_gives_the_logits_of_the_full_square(style, random_parameters):
  def run(attention):
    described = abstract_model(style, ComputeConfig(attention=attention), 70)
    return jax.jit(described.merge(random_parameters(described)).__call__)(ids(5, 2, 70))
  np.testing.assert_allclose(run('blocks'), run('xla'), 1e-5, 1e-5)


@pytest.mark.parametrize('style, changes', [
  ('gpt2', {}), ('modern', {'window': 5, 'global_every': 2}), full('modern', {}), full('gpt2', {'window': 5, 'global_every': 2}),
  *(full(style, changes) for style in ('gpt2', 'modern') for changes in ({'window': 5}, {'window': 16, 'attention_cap': 2.0}))],
  indirect=['style'], ids=str)
def test_reading_with_a_cache_gives_the_logits_of_the_complete_text(style, changes, random_parameters):
  prompt, batch, length = 12, 2, 26
  config = dataclasses.replace(style, **changes)
  described = abstract_model(config, ComputeConfig(), length)
  parameters = random_parameters(described)
  tokens = ids(6, batch, length)

  @jax.jit
  def read(parameters, tokens, start, cached, cache):
    model = described.merge(parameters)
    positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, cache, _ = model.hidden(tokens, Positions(positions, cached=cached), cache)
    return model.head.logits(hidden).reshape(*tokens.shape, -1), cache

  logits, cache = read(parameters, tokens[:, :prompt], 0, None, empty_cache(config, ComputeConfig(), batch, length + 3))
  kept = [layer.keys.shape[2] for layer in cache]
  assert kept == [length + 3 if config.sees_all(layer) else config.window for layer in range(config.layers)]
  pieces = [logits]
  for filled in range(prompt, length):
    logits, cache = read(parameters, tokens[:, filled:filled + 1], filled, jnp.int32(filled), cache)
    pieces.append(logits)
  complete = jax.jit(lambda parameters, tokens: described.merge(parameters)(tokens))(parameters, tokens)
  np.testing.assert_allclose(np.concatenate(pieces, 1), complete, 1e-5, 1e-5)


@pytest.mark.parametrize('style, dropout', [full('gpt2', 0.0), ('modern', 0.2)], indirect=['style'])
def test_a_scan_equals_unrolled_layers_dropout_included(style, dropout, random_parameters):
  style = dataclasses.replace(style, dropout=dropout)
  tokens, key = ids(7, 2, 17), jax.random.split(jax.random.key(1), 2) if dropout else None
  unrolled, scanned = (abstract_model(style, ComputeConfig(scan=scan), 16) for scan in (False, True))
  parameters = random_parameters(unrolled)
  loss, gradients = loss_and_gradients(unrolled, parameters, tokens, key)
  assert_close(loss_and_gradients(scanned, stack_layers(parameters), tokens, key), (loss, stack_layers(gradients)))
  assert scanned.axes['blocks/mlp/up/kernel'] == ('layers', 'embed', ('mlp', style.hidden_width))


@pytest.mark.parametrize('style', ['gpt2'], indirect=True)
@pytest.mark.parametrize('scan', [full(False), True])
def test_recomputation_changes_no_gradient(style, scan, random_parameters):
  def run(remat):
    described = abstract_model(style, ComputeConfig(remat=remat, scan=scan), 16)
    return loss_and_gradients(described, random_parameters(described), ids(7, 2, 17))
  none = run('none')
  assert_close(run('dots'), none)
  assert_close(run('full'), none)


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
def test_shared_key_heads_equal_repeated_ones(style, random_parameters):
  grouped = abstract_model(dataclasses.replace(style, kv_heads=2), ComputeConfig(), 16)
  repeated = abstract_model(dataclasses.replace(style, kv_heads=4), ComputeConfig(), 16)
  parameters = random_parameters(grouped)
  tokens = ids(9, 2, 16)

  def repeat(name, value):
    if '/attention/k/' not in name and '/attention/v/' not in name:
      return value
    heads = np.asarray(value).reshape(*value.shape[:-1], 2, style.head_width)
    return jnp.asarray(np.repeat(heads, 2, axis=-2).reshape(*value.shape[:-1], -1))

  logits = jax.jit(grouped.merge(parameters).__call__)(tokens)
  more = {name: repeat(name, value) for name, value in parameters.items()}
  np.testing.assert_allclose(jax.jit(repeated.merge(more).__call__)(tokens), logits, 1e-5, 1e-5)


def test_padded_ids_are_never_predicted_and_never_learned(style, random_parameters):
  described = abstract_model(style, ComputeConfig(), 16)
  parameters = random_parameters(described)
  assert parameters['tokens/table'].shape[0] == 64 > style.vocab_size
  probabilities = jax.nn.softmax(jax.jit(described.merge(parameters).__call__)(ids(10, 2, 16)))
  assert (probabilities[..., style.vocab_size:] == 0).all()
  np.testing.assert_allclose(probabilities[..., :style.vocab_size].sum(-1), 1, 1e-5)
  gradients = loss_and_gradients(described, parameters, ids(7, 2, 17))[1]
  head = gradients['tokens/table'] if style.tied else gradients['lm_head/kernel'].T
  assert (head[style.vocab_size:] == 0).all() and (head[:style.vocab_size] != 0).any(1).all()


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
def test_bfloat16_computes_close_to_float32_and_keeps_float32_parameters(style, random_parameters, matrix_products):
  def run(dtype):
    described = abstract_model(style, ComputeConfig(dtype=dtype), 16)
    parameters = random_parameters(described)
    tokens = jnp.asarray(ids(7, 2, 17))
    traced = jax.make_jaxpr(lambda parameters: described.merge(parameters)(tokens))(parameters)
    operands = {operand.aval.dtype for product in matrix_products(traced.jaxpr) for operand in product.invars}
    assert operands == {jnp.dtype(dtype)} and traced.out_avals[0].dtype == jnp.float32
    return parameters, loss_and_gradients(described, parameters, tokens)

  _, (full, full_gradients) = run('float32')
  parameters, (half, half_gradients) = run('bfloat16')
  assert {x.dtype for x in jax.tree.leaves((parameters, half_gradients))} == {np.dtype('float32')}
  assert half != full  # it did compute in another precision
  np.testing.assert_allclose(half, full, 1e-2)
  for name, gradient in full_gradients.items():
    if name.endswith('attention/k/bias'):
      continue  # zero but for rounding: the same added to all keys changes no weight of the softmax
    difference = np.linalg.norm(half_gradients[name] - gradient) / np.linalg.norm(gradient)
    assert difference < 0.1, name
