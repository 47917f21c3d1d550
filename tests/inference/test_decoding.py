"""Decoding with a cache gives the results of a full forward pass per token."""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest
from tiers import full

from gptjax.config import ComputeConfig, MeshConfig
from gptjax.inference import Decoder, Sampling
from gptjax.model import abstract_model
from gptjax.planning import collectives
from gptjax.sharding import make_mesh
from gptjax.compilations import CompileCounter

GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def style(style):
  """Each style with a head of its own: a random model with a tied one likes to repeat its last id."""
  return dataclasses.replace(style, tied=False)


of_one_style = pytest.mark.parametrize('style', ['modern'], indirect=True)


@pytest.fixture
def shallow(style):
  """One layer, for what does not depend on their number."""
  return dataclasses.replace(style, layers=1)


def draw(decoder, parameters, prompts, most, sampling=GREEDY, seeds=None):
  """(ids [B, most], log-probabilities [B, most])"""
  steps = decoder(decoder.prepare(parameters), prompts, sampling, range(len(prompts)) if seeds is None else seeds, most)
  ids, logprobs = zip(*steps, strict=True)
  return np.stack(ids, 1), np.stack(logprobs, 1)


@functools.cache
def full_pass(model):
  """A forward pass over all tokens, compiled once for all texts of a model."""
  return jax.jit(lambda parameters, tokens: model.merge(parameters)(tokens)[0])


def recomputed(model, parameters, prompt, count, forbidden=(), penalty=1.0):
  """The most likely continuation by full forward passes over the text so far, and its log-probabilities.

  Text that has filled the context is continued from its later half.
  """
  logits = full_pass(model)
  text, window, logprobs = list(prompt), list(prompt)[-model.context:], []
  for _ in range(count):
    padded = np.zeros((1, model.context), np.int32)  # later tokens change nothing before them
    padded[0, :len(window)] = window
    row = np.array(logits(parameters, padded)[len(window) - 1])
    allowed = row.copy()
    allowed[list(forbidden)] = -np.inf
    seen = list(set(text))
    allowed[seen] *= np.where(allowed[seen] > 0, 1 / penalty, penalty)
    text.append(int(allowed.argmax()))
    logprobs.append(row[text[-1]] - np.log(np.exp(row - row.max()).sum()) - row.max())
    full = len(window) == model.context
    window = text[-max(model.context // 2, 1):] if full else window + text[-1:]
  return text[len(prompt):], logprobs


def prompts_of(*lengths):
  return [np.random.default_rng(length).integers(0, 50, length).tolist() for length in lengths]


@pytest.mark.parametrize('style, scan, changes', [
  ('gpt2', False, {}), ('modern', True, {}), full('modern', False, {'window': 5}),
  full('modern', False, {'window': 3, 'global_every': 2, 'layers': 4}),
  full('modern', False, {'attention_cap': 2.0, 'logit_cap': 3.0, 'norm_at': 'sandwich'}),
  full('modern', True, {'experts': 4, 'shared_experts': 1}),
  full('modern', False, {'experts': 3, 'experts_per_token': 1})], indirect=['style'], ids=str)
def test_greedy_text_of_unequal_prompts_is_that_of_full_forward_passes(style, scan, changes, one_device, random_parameters):
  model = abstract_model(dataclasses.replace(style, **changes), ComputeConfig(scan=scan), 40)
  parameters = random_parameters(model)
  prompts = prompts_of(1, 5, 17, 20)
  ids, logprobs = draw(Decoder(model, one_device), parameters, prompts, 20)
  for row, prompt in enumerate(prompts):
    wanted, scores = recomputed(model, parameters, prompt, 20)
    assert ids[row].tolist() == wanted
    np.testing.assert_allclose(logprobs[row], scores, 1e-4, 1e-4)
  assert len({tuple(row) for row in ids.tolist()}) == 4 and len(set(ids.flatten().tolist())) > 3  # no text that agrees by accident


@pytest.mark.parametrize('style', ['modern', full('gpt2')], indirect=True)
@pytest.mark.parametrize('context', [1, 11])
def test_text_goes_on_beyond_the_context(shallow, context, one_device, random_parameters):
  model = abstract_model(shallow, ComputeConfig(), context)
  parameters = random_parameters(model)
  decoder = Decoder(model, one_device)
  for lengths in ((1, 4), (11, 12), (13, 30)):  # shorter than the context, as long, longer
    prompts = prompts_of(*lengths)
    ids, _ = draw(decoder, parameters, prompts, 30)
    if max(lengths) + 30 <= context or min(map(len, prompts)) >= context:  # rows that fill the context together
      assert ids.tolist() == [recomputed(model, parameters, prompt, 30)[0] for prompt in prompts]
    alone, _ = draw(decoder, parameters, prompts[1:], 30)
    assert alone[0].tolist() == recomputed(model, parameters, prompts[1], 30)[0]


@of_one_style
def test_a_row_is_the_same_alone_and_beside_others(shallow, one_device, random_parameters):
  model = abstract_model(shallow, ComputeConfig(), 64)
  parameters = random_parameters(model)
  decoder = Decoder(model, one_device)
  prompts = prompts_of(3, 9, 1, 30, 2)
  sampling = Sampling(temperature=1.0, top_p=0.95, repetition_penalty=1.2)
  together, _ = draw(decoder, parameters, prompts, 20, sampling, seeds=[7, 8, 9, 10, 2**32 - 1])
  for row, seed in ((1, 8), (4, 2**32 - 1)):
    assert draw(decoder, parameters, [prompts[row]], 20, sampling, [seed])[0].tolist() == together[row:row + 1].tolist()
  again, _ = draw(decoder, parameters, [prompts[0]] * 3, 20, sampling, [7, 7, 8])
  assert again[0].tolist() == again[1].tolist() == together[0].tolist() != again[2].tolist()


@of_one_style
@pytest.mark.parametrize('zero_stage, sizes', [full(0, (2, 4)), full(3, (8, 1)), (3, (4, 2))])
def test_text_is_the_same_on_one_device_and_spread_over_eight(shallow, zero_stage, sizes, random_parameters):
  model = abstract_model(shallow, ComputeConfig(), 64)
  texts = []
  for shape in ((1, 1), sizes):
    with jax.set_mesh(mesh := make_mesh(MeshConfig(*shape))):
      parameters = random_parameters(model, zero_stage=0 if shape == (1, 1) else 3)
      decoder = Decoder(model, mesh, zero_stage=zero_stage)
      texts.append(draw(decoder, parameters, prompts_of(3, 9, 1), 16, Sampling(temperature=1.0))[0].tolist())
  assert texts[0] == texts[1]


@of_one_style
@pytest.mark.parametrize('heads, kv_heads, mesh, rows', [
  (8, 2, '1x1', 1), (8, 2, '1x8', 2), full(8, 1, '2x4', 2), (12, 6, '2x4', 4), full(8, 2, '4x2', 4)], indirect=['mesh'])
def test_a_step_copies_no_cache_and_devices_hold_the_keys_of_their_queries(shallow, heads, kv_heads, mesh, rows, random_parameters):
  model = abstract_model(dataclasses.replace(shallow, heads=heads, head_size=16, kv_heads=kv_heads), ComputeConfig(), 512)
  decoder = Decoder(model, mesh)
  parameters = decoder.prepare(random_parameters(model))
  batch = decoder._batch(prompts_of(*[3] * rows), [[1]] * rows, range(rows), GREEDY)
  state = jax.eval_shape(functools.partial(decoder._prefill, space=496), parameters, batch, np.int32(0))[0]
  keys = state.cache[0].keys
  data, split = (mesh.shape[axis] for axis in ('data', 'model'))
  held = keys.sharding.shard_shape(keys.shape)
  assert held == (rows // data, kv_heads // math.gcd(kv_heads, split), 512, 16)
  compiled = decoder._decode.lower(parameters, state).compile()
  size = math.prod(held)
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * size
  assert all(one.payload < 4 * size for one in collectives(compiled.as_text(), mesh.shape))
  copied = re.findall(r' = f32\[([\d,]+)\]\S* (?:copy|copy-start|broadcast|all-gather)\(', compiled.as_text())
  assert all(math.prod(map(int, shape.split(','))) < size for shape in copied)


@pytest.mark.parametrize('style', ['modern'], indirect=True)
@pytest.mark.parametrize('heads, kv_heads, sizes', [(12, 6, (2, 4)), full(8, 2, (1, 8)), full(8, 1, (2, 4)), full(4, 2, (4, 2))])
def test_text_is_the_same_where_model_does_not_divide_the_key_heads(style, heads, kv_heads, sizes, random_parameters):
  model = abstract_model(dataclasses.replace(style, heads=heads, head_size=8, kv_heads=kv_heads, window=6, global_every=2),
                         ComputeConfig(), 64)
  texts = []
  for shape in ((1, 1), sizes):
    with jax.set_mesh(mesh := make_mesh(MeshConfig(*shape))):
      texts.append(draw(Decoder(model, mesh), random_parameters(model), prompts_of(3, 9, 1), 16, Sampling(temperature=1.0))[0].tolist())
  assert texts[0] == texts[1]


@of_one_style
def test_forbidden_and_padded_ids_never_appear(shallow, one_device, random_parameters):
  model = abstract_model(shallow, ComputeConfig(), 64)
  parameters = random_parameters(model)
  free, _ = draw(Decoder(model, one_device), parameters, [[9]], 20)
  forbidden = tuple(sorted(set(free[0].tolist())))[:6]
  decoder = Decoder(model, one_device, forbidden)
  assert draw(decoder, parameters, [[9]], 20)[0][0].tolist() == recomputed(model, parameters, [9], 20, forbidden)[0]
  wild, _ = draw(decoder, parameters, [[9]] * 8, 60, Sampling(temperature=50.0))
  assert set(wild.flatten().tolist()) == set(range(shallow.vocab_size)) - set(forbidden)  # and all others do


@of_one_style
def test_ids_of_prompt_and_text_are_penalized(shallow, one_device, random_parameters):
  # A tied head likes to repeat; and the text outgrows the context.
  model = abstract_model(dataclasses.replace(shallow, tied=True), ComputeConfig(), 24)
  parameters = random_parameters(model)
  prompts = prompts_of(9, 9)
  ids, _ = draw(Decoder(model, one_device), parameters, prompts, 40, Sampling(0.0, repetition_penalty=1.7))
  assert ids.tolist() == [recomputed(model, parameters, prompt, 40, penalty=1.7)[0] for prompt in prompts]
  assert ids.tolist() != [recomputed(model, parameters, prompt, 40)[0] for prompt in prompts]


@of_one_style
def test_a_bucket_of_shapes_is_compiled_once(shallow, one_device, random_parameters):
  model = abstract_model(shallow, ComputeConfig(), 64)
  decoder = Decoder(model, one_device)
  weights = decoder.prepare(random_parameters(model))
  run = lambda lengths, most: list(decoder(weights, prompts_of(*lengths), Sampling(), range(len(lengths)), most))
  run((1, 2, 9), 20)
  counter = CompileCounter()
  try:
    for lengths, most in (((3, 4, 16), 17), ((16, 1, 2, 8), 24), ((11,) * 3, 20)):
      run(lengths, most)
    assert counter.count == 0
    run((17,), 20)
    assert counter.count > 0
  finally:
    counter.close()


@of_one_style
def test_preparing_and_decoding_leave_the_parameters_alone(shallow, one_device, random_parameters):
  model = abstract_model(shallow, ComputeConfig(), 8)
  parameters = random_parameters(model)
  before = jax.tree.map(np.array, parameters)
  draw(Decoder(model, one_device), parameters, [[1]], 10)
  assert all(np.array_equal(parameters[name], before[name]) for name in before)
