"""A score is the plain sum over all documents, with every target once, for all batches, rows and devices."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from tiers import full
from small_stores import make_store, stream

from gptjax.config import ComputeConfig, MeshConfig, SourceConfig
from gptjax.data import EvalRows, Recipe, open_source, tokenizing, write_store
from gptjax.data.examples import encode_example
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.evaluation import Scorer, pooled
from gptjax.model import abstract_model
from gptjax.sharding import make_mesh
from gptjax.training import next_token
from gptjax.compilations import CompileCounter

CONTEXT = 16
LENGTHS = [40, 3, 0, 14, 15, 1, 7, 45]
"""Tokens of each document after its separator (1); some end where a row ends, some fill several rows."""


@pytest.fixture(scope='module')
def held(tmp_path_factory):
  """The documents as a store."""
  return make_store(tmp_path_factory.mktemp('held') / 'store', [length + 1 for length in LENGTHS], vocab_size=259,
                    draw=lambda count: np.random.default_rng(0).integers(4, 50, count))


def rows_of(held):
  """The circle in rows of CONTEXT inputs; each row's last token is the next one's first."""
  tokens = [*stream(held).astype(int), 1]
  return [np.array(tokens[start:start + CONTEXT + 1]) for start in range(0, len(tokens) - 1, CONTEXT)]


def pieces_of(row):
  """The documents of a row, each by itself and with the separator that ends it."""
  begins = [0, *(i for i in range(1, len(row) - 1) if row[i] == 1), len(row) - 1]
  return [row[begin:end + 1] for begin, end in zip(begins, begins[1:])]


@pytest.fixture
def model(style):
  return abstract_model(dataclasses.replace(style, layers=1), ComputeConfig(), CONTEXT)


@pytest.fixture
def plain(model, random_parameters, one_device):
  """A function (row, isolate): nats and targets of one row; the model sees one document at a time, or the row."""
  parameters = random_parameters(model)
  logits = jax.jit(lambda tokens: model.merge(parameters)(tokens)[0])

  def nats(tokens):
    # What stands after the tokens cannot change their logits.
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, :len(tokens) - 1] = tokens[:-1]
    exact = np.float64(logits(padded))[:len(tokens) - 1]
    exact -= exact.max(-1, keepdims=True)
    log_probabilities = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    return -log_probabilities[np.arange(len(exact)), tokens[1:]].sum(), len(exact)

  def total(row, isolate):
    pieces = pieces_of(row) if isolate else [row]
    return np.sum([nats(piece) for piece in pieces if len(piece) > 1], axis=0)

  return total


def score(model, parameters, held, *, isolate, batch_size, **asked):
  scorer = Scorer(model, next_token(z_loss=0.1), jax.sharding.get_mesh(), batch_size)
  return scorer(parameters, EvalRows(held, CONTEXT, isolate), **asked)


def assert_score(got, nats, tokens, text_bytes):
  """The three figures follow from the sums of nats, targets and bytes."""
  assert got.tokens == tokens
  np.testing.assert_allclose(got.loss, nats / tokens, rtol=1e-6)
  np.testing.assert_allclose(got.perplexity, math.exp(nats / tokens), rtol=1e-5)
  np.testing.assert_allclose(got.bits_per_byte, nats / math.log(2) / text_bytes, rtol=1e-6)


@pytest.mark.parametrize('isolate', [True, False])
def test_a_score_is_a_plain_loop_over_documents(model, plain, random_parameters, held, isolate):
  nats, tokens = np.sum([plain(row, isolate) for row in rows_of(held)], axis=0)
  assert tokens == held.tokens == sum(LENGTHS) + len(LENGTHS)
  parameters = random_parameters(model)
  for batch_size in (1, 3, 8, 64):  # 9 rows: the last batch is full, has one row, or is mostly padding
    got = score(model, parameters, held, isolate=isolate, batch_size=batch_size)
    assert_score(got, nats, tokens, held.bytes)
    assert {type(got.tokens), type(got.bytes)} == {int}


def test_isolation_matters_here(model, random_parameters, held, one_device):
  parameters = random_parameters(model)
  alone, together = (score(model, parameters, held, isolate=isolate, batch_size=4) for isolate in (True, False))
  assert abs(alone.loss - together.loss) > 1e-3


@pytest.mark.parametrize('count', [full(1), 4, full(8), 9, full(100)])
def test_a_part_of_the_rows_is_evenly_spaced_and_stands_for_its_bytes(model, plain, random_parameters, held, count):
  rows = rows_of(held)
  assert len(rows) == 9
  chosen = {1: [0], 4: [0, 2, 4, 6], 8: [0, 1, 2, 3, 4, 5, 6, 7]}.get(count, range(9))
  nats, tokens = np.sum([plain(rows[i], True) for i in chosen], axis=0)
  advanced = []
  got = score(model, random_parameters(model), held, isolate=True, batch_size=4, count=count, advance=advanced.append)
  assert_score(got, nats, tokens, held.bytes * tokens / held.tokens)
  assert sum(advanced) == len(chosen)


@pytest.mark.parametrize('mesh', [full('8x1'), '4x2'], indirect=True)
@pytest.mark.parametrize('zero_stage', [full(0), 3])
def test_a_score_is_the_same_on_all_devices(model, random_parameters, held, mesh, zero_stage):
  got = score(model, random_parameters(model, zero_stage), held, isolate=True, batch_size=8)
  with jax.set_mesh(make_mesh(MeshConfig(1, 1))):
    want = score(model, random_parameters(model), held, isolate=True, batch_size=8)
  assert_score(got, want.loss * want.tokens, want.tokens, held.bytes)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(model, held, one_device):
  zeros = {name: jax.numpy.zeros(shape.shape) for name, shape in model.shapes.items()}
  got = score(model, zeros, held, isolate=True, batch_size=4)
  assert_score(got, math.log(50) * held.tokens, held.tokens, held.bytes)


def test_tags_and_all_sets_count_every_target_alike(model, random_parameters, held, tmp_path, one_device):
  other = make_store(tmp_path / 'other', [5, 80], vocab_size=259, draw=lambda count: np.full(count, 7))
  parameters = random_parameters(model)
  sets = {'a': EvalRows(held, CONTEXT, True), 'b': EvalRows(other, CONTEXT, True)}
  scorer = Scorer(model, next_token(), one_device, 4)
  scores = scorer.sets(parameters, sets, {'both': ['a', 'b'], 'one': ['b']})
  a, b = scores.sets['a'], scores.sets['b']
  assert (a, b) == (scorer(parameters, sets['a']), scorer(parameters, sets['b'])) and a.loss != b.loss
  nats = a.loss * a.tokens + b.loss * b.tokens
  assert_score(scores.tags['both'], nats, a.tokens + b.tokens, held.bytes + other.bytes)
  assert scores.overall == scores.tags['both'] and scores.tags['one'] == pooled([b])
  assert [*scores.named()] == ['a', 'b', 'tag/both', 'tag/one', 'valid']


def test_examples_are_scored_by_their_weights(model, random_parameters, tmp_path, one_device, monkeypatch):
  (tmp_path / 'a.jsonl').write_text('\n'.join('{"q": "!!!!", "a": "##"}' for _ in range(5)))
  recipe = Recipe(open_source(SourceConfig(str(tmp_path / 'a.jsonl'), prompt='q', completion='a')), ByteTokenizer())
  scorer, parameters, found = Scorer(model, next_token(), one_device, 4), random_parameters(model), {}
  for weight in (1.0, 0.25):
    def weighted(*args, weight=weight):
      one = encode_example(*args)
      return one._replace(weights=weight * one.weights, target_bytes=weight * one.target_bytes)
    monkeypatch.setattr(tokenizing, 'encode_example', weighted)
    rows = EvalRows(write_store(tmp_path / str(weight), recipe), CONTEXT, True, tmp_path)
    found[weight] = scorer(parameters, rows)
    assert (found[weight].tokens, found[weight].bytes) == (weight * 5 * 3, weight * 5 * 2)
  assert found[0.25].loss == pytest.approx(found[1.0].loss) and found[0.25].bits_per_byte == pytest.approx(found[1.0].bits_per_byte)


def test_one_program_scores_all_sets(model, random_parameters, held, tmp_path, one_device):
  parameters = random_parameters(model)
  scorer = Scorer(model, next_token(), one_device, 4)
  scorer(parameters, EvalRows(held, CONTEXT, True))
  counter = CompileCounter()
  try:
    scorer(parameters, EvalRows(make_store(tmp_path / 'other', [9] * 30, vocab_size=259, draw=np.ones), CONTEXT, True))
    assert counter.count == 0
  finally:
    counter.close()
