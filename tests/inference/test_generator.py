"""Generation with a cache says what the whole model, asked anew for each token, would say."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, ModelConfig, TokenizerConfig, UserError
from gptjax.data import train_tokenizer
from gptjax.data.tokenizers import CharTokenizer
from gptjax.inference import Generator, Sampling, never_drawn
from gptjax.model import blueprint
from gptjax.sharding import make_mesh
from gptjax.training.hardware import CompileCounter

GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def style(style):
  """Each style with a head of its own: a random model with a tied one likes to repeat its last id."""
  return dataclasses.replace(style, tied=False)


def take(generator, parameters, prompt, count, key=None):
  return list(itertools.islice(generator(parameters, prompt, jax.random.key(7) if key is None else key), count))


def recomputed(plan, parameters, prompt, count, forbidden=()):
  """The likeliest continuation by full forward passes over the text so far.

  Text that has filled the context is continued from its later half.
  """
  logits = jax.jit(lambda parameters, tokens: plan.merge(parameters)(tokens)[0])
  text, window = list(prompt), list(prompt)[-plan.context:]
  for _ in range(count):
    padded = np.zeros((1, plan.context), np.int32)  # what comes later changes nothing before it
    padded[0, :len(window)] = window
    row = np.array(logits(parameters, padded)[len(window) - 1])
    row[list(forbidden)] = -np.inf
    text.append(int(row.argmax()))
    full = len(window) == plan.context
    window = text[-max(plan.context // 2, 1):] if full else window + text[-1:]
  return text[len(prompt):]


@pytest.mark.parametrize('scan', [False, True])
def test_greedy_text_is_that_of_full_forward_passes_even_beyond_the_context(style, scan, one_device, random_parameters):
  plan = blueprint(dataclasses.replace(style, scan=scan), 12)
  parameters = random_parameters(plan)
  generator = Generator(plan, one_device, GREEDY)
  for length in (1, 5, 11, 12, 13, 30):  # of the prompt: shorter than the context, as long, longer
    prompt = np.random.default_rng(length).integers(0, 50, length).tolist()
    drawn = take(generator, parameters, prompt, 30)
    assert drawn == recomputed(plan, parameters, prompt, 30)
    assert len(set(drawn)) > 3  # no text that would agree by accident


@pytest.mark.parametrize('context', [1, 5])
@pytest.mark.parametrize('style', ['modern'], indirect=True)
def test_a_context_of_any_size_will_do(style, context, one_device, random_parameters):
  plan = blueprint(style, context)
  parameters = random_parameters(plan)
  drawn = take(Generator(plan, one_device, GREEDY), parameters, [3, 1, 4], 12)
  assert drawn == recomputed(plan, parameters, [3, 1, 4], 12)


def test_forbidden_and_padded_ids_never_appear(style, one_device, random_parameters):
  plan = blueprint(style, 12)
  parameters = random_parameters(plan)
  free = take(Generator(plan, one_device, GREEDY), parameters, [9], 20)
  forbidden = tuple(sorted(set(free)))[:6]
  assert take(Generator(plan, one_device, GREEDY, forbidden), parameters, [9], 20) == recomputed(
      plan, parameters, [9], 20, forbidden)
  wild = take(Generator(plan, one_device, Sampling(temperature=50.0), forbidden), parameters, [9], 400)
  assert set(wild) == set(range(style.vocab_size)) - set(forbidden)  # and all others do


def test_ids_no_text_continues_with_are_all_special_ones_but_eos_and_all_the_tokenizer_has_not():
  tokenizer = train_tokenizer(TokenizerConfig(kind='bytes'), [])
  config = ModelConfig(vocab_size=262, vocab_multiple=8)
  assert set(range(264)) - set(never_drawn(tokenizer, config)) == {tokenizer.eos_id, *range(3, 259)}


def test_draws_repeat_with_their_key(style, one_device, random_parameters):
  plan = blueprint(style, 12)
  parameters = random_parameters(plan)
  generator = Generator(plan, one_device, Sampling(temperature=1.0))
  one, again, other = (take(generator, parameters, [5, 6], 30, jax.random.key(seed)) for seed in (0, 0, 1))
  assert one == again != other


def test_the_text_is_the_same_on_one_device_and_spread_over_eight(style, random_parameters):
  plan = blueprint(style, 12)
  texts = []
  for sizes in ((1, 1), (4, 2)):
    with jax.set_mesh(mesh := make_mesh(MeshConfig(*sizes))):
      parameters = random_parameters(plan, zero_stage=0 if sizes == (1, 1) else 3)
      texts.append(take(Generator(plan, mesh, Sampling(temperature=1.0)), parameters, [1, 2, 3], 30))
  assert texts[0] == texts[1]


def test_prompts_of_every_length_share_two_programs(style, one_device, random_parameters):
  plan = blueprint(style, 12)
  parameters = random_parameters(plan)
  generator = Generator(plan, one_device, Sampling())
  take(generator, parameters, [1], 20)
  counter = CompileCounter()
  try:
    for length in (2, 11, 12, 20):
      take(generator, parameters, list(range(length)), 20)
    assert counter.count == 0
  finally:
    counter.close()


@pytest.fixture
def byte_model(one_device, random_parameters):
  """A tokenizer of bytes, a random model for it and a generator; bytes of text hardly ever form whole characters."""
  tokenizer = train_tokenizer(TokenizerConfig(kind='bytes'), [])
  plan = blueprint(ModelConfig(layers=1, width=16, heads=2, vocab_size=tokenizer.vocab_size), 64)
  parameters = random_parameters(plan)
  return tokenizer, plan, parameters, Generator(plan, one_device, Sampling(temperature=2.0), (tokenizer.pad_id,))


@pytest.mark.parametrize('seed', range(3))
def test_pieces_of_text_join_to_the_decoded_ids_and_end_before_eos(byte_model, seed):
  tokenizer, _, parameters, generator = byte_model
  key = jax.random.key(seed)
  prompt = 'naïve'
  ids = take(generator, parameters, [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()], 600, key)
  end = ids.index(tokenizer.eos_id)  # a random model says it once in 260 ids
  for most in (0, 1, 10, end, end + 1, 600):
    pieces = list(generator.text(parameters, tokenizer, prompt, most, key))
    assert ''.join(pieces) == tokenizer.decode(ids[:min(most, end)])
    assert len(pieces) == min(most, end) + 1  # one an id, and what was held back


def test_a_prompt_the_tokenizer_cannot_encode_is_named(one_device, random_parameters, style):
  tokenizer = CharTokenizer('abc')
  plan = blueprint(style, 4)
  generator = Generator(plan, one_device, GREEDY)
  with pytest.raises(UserError, match='^--prompt, character 2'):
    next(generator.text(random_parameters(plan), tokenizer, 'abz', 5, jax.random.key(0)))


def test_generation_leaves_the_parameters_alone(style, one_device, random_parameters):
  plan = blueprint(style, 8)
  parameters = random_parameters(plan)
  before = jax.tree.map(np.array, parameters)
  take(Generator(plan, one_device, GREEDY), parameters, [1], 10)
  assert all(jnp.array_equal(parameters[name], before[name]) for name in before)
