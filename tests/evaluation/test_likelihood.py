"""Likelihoods of continuations equal those of single full forward passes, for all batches and devices."""

import dataclasses

import jax
import numpy as np
import pytest
from tiers import full

from gptjax.config import ComputeConfig, MeshConfig
from gptjax.evaluation import LikelihoodScorer, Request
from gptjax.model import abstract_model
from gptjax.sharding import make_mesh
from gptjax.compilations import CompileCounter

CONTEXT = 20


@pytest.fixture
def model(style):
  return abstract_model(dataclasses.replace(style, layers=1), ComputeConfig(), CONTEXT)


def questions(count=20, seed=0):
  """Contexts and continuations of all lengths, some longer together than the model's context, some of one token, one of none."""
  rng = np.random.default_rng(seed)
  ids = lambda n: rng.integers(4, 50, n).tolist()
  lengths = [(1, CONTEXT), (CONTEXT, 1), (CONTEXT + 30, 7), (1, 1), (5, 0), *rng.integers(1, CONTEXT // 2, (count, 2)).tolist()]
  return [Request(ids(context), ids(continuation)) for context, continuation in lengths]


def plain(model, parameters, asked):
  """Nats and greediness, from logits of every position of one row at a time, in float64."""
  logits = jax.jit(lambda tokens: model.merge(parameters)(tokens)[0])
  answers = []
  for context, continuation in asked:
    ids = [*context, *continuation][-(CONTEXT + 1):]
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, :len(ids) - 1] = ids[:-1]  # later tokens cannot change them
    exact = np.float64(logits(padded))[:len(ids) - 1]
    exact = exact[len(exact) - len(continuation):] - exact.max()
    nats = exact[np.arange(len(continuation)), continuation] - np.log(np.exp(exact).sum(-1))
    answers.append((nats.sum(), bool((exact.argmax(-1) == continuation).all())))
  return answers


def greedy_requests(model, parameters, asked):
  """The same contexts, each continued with its most likely ids."""
  logits = jax.jit(lambda tokens, at: model.merge(parameters)(tokens)[0, at])
  answers = []
  for context, _ in asked:
    ids = list(context)
    for _ in range(3):
      padded = np.zeros((1, CONTEXT), np.int32)
      padded[0, :len(ids)] = ids[-CONTEXT:]
      ids.append(int(logits(padded, min(len(ids), CONTEXT) - 1).argmax()))
    answers.append(Request(context, ids[len(context):]))
  return answers


def test_likelihoods_are_those_of_full_forward_passes(model, random_parameters, one_device):
  parameters = random_parameters(model)
  asked = questions()
  asked += greedy_requests(model, parameters, [one for one in asked if len(one.context) + 3 <= CONTEXT])
  done = []
  found = LikelihoodScorer(model, one_device, 200)(parameters, asked, done.append)
  for got, (nats, greedy) in zip(found, plain(model, parameters, asked), strict=True):
    np.testing.assert_allclose(got.nats, nats, rtol=1e-4, atol=1e-4)
    assert got.greedy == greedy
  assert {one.greedy for one in found} == {True, False} and sum(done) == len(asked) and min(done) >= 0
  assert found[4] == (0, True)  # an empty continuation is certain


@pytest.mark.parametrize('mesh, style', [('4x2', 'modern'), full('2x4', 'gpt2')], indirect=True)
def test_likelihoods_are_the_same_on_every_mesh(model, random_parameters, mesh):
  asked = questions()
  got = LikelihoodScorer(model, mesh, 200)(random_parameters(model), asked)
  with jax.set_mesh(one := make_mesh(MeshConfig(1, 1))):
    want = LikelihoodScorer(model, one, 500)(random_parameters(model), asked)
  np.testing.assert_allclose([score.nats for score in got], [score.nats for score in want], rtol=1e-5, atol=1e-5)
  assert [score.greedy for score in got] == [score.greedy for score in want]


@pytest.mark.parametrize('style', ['modern'], indirect=True)
def test_other_parameters_need_no_other_program(model, random_parameters, one_device):
  scorer, asked = LikelihoodScorer(model, one_device, 200), questions()
  first = scorer(random_parameters(model), asked)
  other = random_parameters(model, seed=1)
  counter = CompileCounter()
  try:
    assert scorer(other, asked) != first and counter.count == 0
  finally:
    counter.close()
