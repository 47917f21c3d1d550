"""Text of the drawn ids: its end, and the pieces in which it is streamed."""

import itertools

import numpy as np
import pytest
from published_tokenizers import FAMILIES
from tiers import full

from gptjax.config import ComputeConfig, ModelConfig, TokenizerConfig, UserError
from gptjax.data import train_tokenizer
from gptjax.data.tokenizers import CharTokenizer, load_tokenizer
from gptjax.inference import Generator, Sampling, suppressed_ids
from gptjax.model import abstract_model

WILD = Sampling(temperature=2.0)


def test_all_special_ids_but_eos_and_all_ids_that_the_tokenizer_lacks_are_suppressed():
  tokenizer = train_tokenizer(TokenizerConfig(kind='bytes'), [])
  config = ModelConfig(vocab_size=262, vocab_multiple=8)
  assert set(range(264)) - set(suppressed_ids(tokenizer, config)) == {tokenizer.eos_id, *range(3, 259)}


def test_a_bos_that_is_not_the_eos_is_suppressed(tmp_path):
  FAMILIES['gemma'](tmp_path)
  tokenizer = load_tokenizer(tmp_path)
  never = suppressed_ids(tokenizer, ModelConfig(vocab_size=tokenizer.vocab_size, vocab_multiple=1))
  assert set(never) == {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id}
  assert not {*never} & {*tokenizer.stop_ids}


@pytest.fixture
def byte_generator(one_device, random_parameters):
  """A generator of a random model for bytes, and its weights; bytes of text hardly ever form complete characters."""
  tokenizer = train_tokenizer(TokenizerConfig(kind='bytes'), [])
  model = abstract_model(ModelConfig(layers=1, width=16, heads=2, vocab_size=tokenizer.vocab_size), ComputeConfig(), 64)
  generator = Generator(model, one_device, tokenizer)
  return generator, generator.prepare(random_parameters(model))


def test_text_is_the_decoded_ids_and_ends_before_eos(byte_generator):
  generator, weights = byte_generator
  prompt = generator.prompt('naïve')
  complete = generator(weights, [prompt] * 3, max_tokens=300, sampling=WILD, stop_ids=())  # a random model draws eos once in 260 ids
  for most in (1, 10, 300):
    for row, (one, long) in enumerate(zip(generator(weights, [prompt] * 3, max_tokens=most, sampling=WILD), complete, strict=True)):
      eos = generator.tokenizer.eos_id
      end = long.ids.index(eos) + 1 if eos in long.ids else len(long.ids) + 1  # not yet drawn
      assert one.ids == long.ids[:min(most, end)], row
      assert one.ended == ('id' if end <= most else 'length')
      assert one.text == generator.tokenizer.decode(one.ids)
      assert len(one.logprobs) == len(one.ids)
  assert any(generator.tokenizer.eos_id in row.ids for row in complete)


def test_streamed_pieces_of_each_row_join_to_its_text(byte_generator):
  generator, weights = byte_generator
  prompts = [generator.prompt(text) for text in ('', 'a', 'naïve')]
  settings = {'max_tokens': 150, 'sampling': WILD, 'stop': ['zq', 'q', 'uvw']}
  stream = generator.stream(weights, prompts, **settings)
  pieces = ['', '', '']
  while True:
    try:
      row, piece = next(stream)
    except StopIteration as done:
      rows = done.value
      break
    assert piece
    pieces[row] += piece
  assert pieces == [row.text for row in rows]
  assert rows == generator(weights, prompts, **settings)


def cuts(text, strings):
  """The text before the first of the strings in it."""
  return text[:min((text.find(one) for one in strings if one in text), default=len(text))]


@pytest.mark.parametrize('seed', [0, full(1), full(2), full(3)])
def test_a_stop_string_ends_the_text_wherever_its_characters_come_from(byte_generator, seed):
  generator, weights = byte_generator
  prompt = [generator.prompt('x')]
  free = generator(weights, prompt, max_tokens=120, sampling=WILD, seeds=[seed], stop_ids=())[0].text
  letters = [(free[i:i + n], i) for n, i in itertools.product((1, 2, 5), (3, 17, 40)) if i + n < len(free)]
  for string, _ in letters:
    for stop in ([string], [string, free[60:63]], ['no such text', string]):
      found = generator(weights, prompt, max_tokens=120, sampling=WILD, seeds=[seed], stop=stop, stop_ids=())[0]
      assert (found.text, found.ended) == (cuts(free, stop), 'text')


def test_rows_that_ended_yield_nothing_while_others_continue(byte_generator):
  generator, weights = byte_generator
  prompts = [generator.prompt(text) for text in 'abcdefgh']
  free = generator(weights, prompts, max_tokens=80, sampling=WILD, stop_ids=())
  stop_id = free[0].ids[20]
  for complete, found in zip(free, generator(weights, prompts, max_tokens=80, sampling=WILD, stop_ids=[stop_id]), strict=True):
    end = complete.ids.index(stop_id) + 1 if stop_id in complete.ids else 80
    assert found.ids == complete.ids[:end]
    np.testing.assert_allclose(found.logprobs, complete.logprobs[:end], 1e-6)


def test_the_error_for_a_prompt_that_cannot_be_encoded_names_it(one_device):
  model = abstract_model(ModelConfig(vocab_size=6, width=16, heads=2), ComputeConfig(), 4)
  generator = Generator(model, one_device, CharTokenizer('abc'))
  with pytest.raises(UserError, match='^--prompt, character 2'):
    generator.prompt('abz')
  with pytest.raises(UserError, match='^prompts.txt:3, character 0'):
    generator.prompt('z', 'prompts.txt:3')
