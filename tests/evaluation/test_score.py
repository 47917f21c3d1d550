"""A score is the plain sum over all documents: every target once, whatever the batches, rows and devices."""

import dataclasses
import math
import pathlib

import jax
import numpy as np
import pytest

from gptjax.data import EvalRows, TokenStore
from gptjax.evaluation import Scorer
from gptjax.model import blueprint
from gptjax.training import next_token

CONTEXT = 16
LENGTHS = [40, 3, 0, 14, 15, 1, 7, 37]
"""Tokens of each document between bos (1) and eos (2); some end where a row ends, some fill several rows."""


def store():
  rng = np.random.default_rng(0)
  stream = np.concatenate([[1, *rng.integers(4, 50, length), 2] for length in LENGTHS]).astype(np.uint16)
  starts = np.cumsum([0, *(length + 2 for length in LENGTHS[:-1])])
  return TokenStore(pathlib.Path(), stream, starts, bytes=3 * sum(LENGTHS), vocab_size=50, pad_id=0, bos_id=1, eos_id=2,
                    sha256='')


def rows_of(tokens):
  """The stream in rows of CONTEXT inputs; each row's last token is the next one's first."""
  return [tokens[start:start + CONTEXT + 1] for start in range(0, len(tokens) - 1, CONTEXT)]


def pieces_of(row):
  """The documents of a row, each by itself."""
  begins = [0, *(i for i in range(1, len(row)) if row[i] == 1), len(row)]
  return [row[begin:end] for begin, end in zip(begins, begins[1:])]


@pytest.fixture
def model(style):
  return blueprint(dataclasses.replace(style, layers=1), CONTEXT)


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
    counted = tokens[1:] != 1
    return -log_probabilities[np.arange(len(counted)), tokens[1:]][counted].sum(), counted.sum()

  def total(row, isolate):
    pieces = pieces_of(row) if isolate else [row]
    return np.sum([nats(piece) for piece in pieces if len(piece) > 1], axis=0)

  return total


def score(model, parameters, *, isolate, batch_size, **asked):
  scorer = Scorer(model, next_token(z_loss=0.1), EvalRows(store(), CONTEXT), jax.sharding.get_mesh(),
                  batch_size=batch_size, isolate_documents=isolate)
  return scorer(parameters, **asked)


def assert_score(got, nats, tokens, text_bytes):
  """The three figures are those of so many nats, targets and bytes."""
  assert got.tokens == tokens
  np.testing.assert_allclose(got.loss, nats / tokens, rtol=1e-6)
  np.testing.assert_allclose(got.perplexity, math.exp(nats / tokens), rtol=1e-5)
  np.testing.assert_allclose(got.bits_per_byte, nats / math.log(2) / text_bytes, rtol=1e-6)


@pytest.mark.parametrize('isolate', [True, False])
def test_a_score_is_a_plain_loop_over_documents(model, plain, random_parameters, isolate):
  held = store()
  nats, tokens = np.sum([plain(row, isolate) for row in rows_of(held.tokens)], axis=0)
  assert tokens == held.targets == sum(LENGTHS) + len(LENGTHS)
  parameters = random_parameters(model)
  for batch_size in (1, 3, 8, 64):  # 9 rows: the last batch is whole, has one row, or is mostly padding
    assert_score(score(model, parameters, isolate=isolate, batch_size=batch_size), nats, tokens, held.bytes)


def test_isolation_matters_here(model, random_parameters, one_device):
  parameters = random_parameters(model)
  alone, together = (score(model, parameters, isolate=isolate, batch_size=4) for isolate in (True, False))
  assert abs(alone.loss - together.loss) > 1e-3


@pytest.mark.parametrize('count', [1, 4, 8, 9, 100])
def test_a_part_of_the_rows_is_evenly_spaced_and_stands_for_its_bytes(model, plain, random_parameters, count):
  held = store()
  rows = rows_of(held.tokens)
  assert len(rows) == 9
  chosen = {1: [0], 4: [0, 2, 4, 6], 8: [0, 1, 2, 3, 4, 5, 6, 7]}.get(count, range(9))
  nats, tokens = np.sum([plain(rows[i], True) for i in chosen], axis=0)
  told = []
  got = score(model, random_parameters(model), isolate=True, batch_size=4, count=count, advance=told.append)
  assert_score(got, nats, tokens, held.bytes * tokens / held.targets)
  assert sum(told) == len(chosen)


@pytest.mark.parametrize('mesh', ['8x1', '4x2'], indirect=True)
@pytest.mark.parametrize('zero_stage', [0, 3])
def test_a_score_is_the_same_on_all_devices(model, random_parameters, mesh, zero_stage):
  got = score(model, random_parameters(model, zero_stage), isolate=True, batch_size=8)
  with jax.set_mesh(jax.make_mesh((1, 1), ('data', 'model'), axis_types=mesh.axis_types, devices=jax.devices()[:1])):
    want = score(model, random_parameters(model), isolate=True, batch_size=8)
  assert_score(got, want.loss * want.tokens, want.tokens, store().bytes)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary(model, one_device):
  zeros = {name: jax.numpy.zeros(shape.shape) for name, shape in model.shapes.items()}
  held = store()
  got = score(model, zeros, isolate=True, batch_size=4)
  assert_score(got, math.log(50) * held.targets, held.targets, held.bytes)
