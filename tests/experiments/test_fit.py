"""The law of the loss is recovered from runs that follow it, with intervals that hold, on data that is computed by its formula."""

import dataclasses
import itertools

import numpy as np
import pytest

from experiments.scaling_law.fit import CONFIDENCE, DELTA, Law, fit, minimized, objective
from experiments.scaling_law.published import CHINCHILLA, EPOCH, kaplan_exponent
from gptjax.config import UserError

LAW = Law(E=1.5, A=60.0, B=400.0, alpha=0.3, beta=0.35)
FIGURES = {'E': lambda law: law.E, 'A': lambda law: law.A, 'B': lambda law: law.B, 'alpha': lambda law: law.alpha,
           'beta': lambda law: law.beta, 'a': lambda law: law.exponents[0], 'N': lambda law: law.optimum(1e17)[0]}


def runs(noise=0.0, seed=0, law=LAW):
  """N, D and losses of 30 runs, with a relative noise: five budgets, each with 2 to 200 tokens per parameter."""
  compute, ratio = np.array([*itertools.product(np.geomspace(1e13, 1e16, 5), np.geomspace(2, 200, 6))]).T
  parameters = np.sqrt(compute / 6 / ratio)
  tokens = compute / 6 / parameters
  return parameters, tokens, law.loss(parameters, tokens) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(compute)))


def test_gradients_are_those_of_finite_differences():
  logs = [np.log(values) for values in runs(noise=2 * DELTA)]  # residuals on both sides of DELTA
  center = np.log([LAW.A, LAW.B, LAW.E]).tolist() + [LAW.alpha, LAW.beta]
  for seed in range(5):
    at = center + 1e-4 * np.random.default_rng(seed).standard_normal(5)
    value, gradient = objective(at, *logs)
    slopes = [(objective(at + step, *logs)[0] - objective(at - step, *logs)[0]) / 2e-7 for step in 1e-7 * np.eye(5)]
    assert value > 0 and gradient == pytest.approx(slopes, rel=1e-4, abs=1e-8)


def test_the_objective_is_the_sum_of_huber_losses_of_the_log_loss():
  parameters, tokens, loss = runs(noise=2 * DELTA)
  residuals = np.abs(np.log(LAW.loss(parameters, tokens) / loss))
  assert 5 < np.sum(residuals > DELTA) < 25
  expected = np.where(residuals < DELTA, residuals ** 2 / 2, DELTA * (residuals - DELTA / 2)).sum()
  constants = np.array([np.log(LAW.A), np.log(LAW.B), np.log(LAW.E), LAW.alpha, LAW.beta])
  assert objective(constants, *map(np.log, (parameters, tokens, loss)))[0] == pytest.approx(expected)


@pytest.mark.parametrize('law', [LAW, CHINCHILLA, Law(0.5, 3.0, 5e4, 0.15, 0.7)], ids=['small', 'chinchilla', 'uneven'])
def test_constants_are_recovered_without_noise(law):
  found = fit(*runs(law=law), resamples=0)
  assert dataclasses.astuple(found.law) == pytest.approx(dataclasses.astuple(law), rel=1e-3)
  assert found.objective < 1e-12 and np.abs(found.residuals).max() < 1e-6


def test_with_noise_the_constants_are_in_their_intervals_and_outliers_hardly_count():
  parameters, tokens, loss = runs(noise=0.003)
  loss[[4, 17]] *= 1.5
  found = fit(parameters, tokens, loss, resamples=40)
  for figure in FIGURES.values():
    low, high = found.interval(figure)
    assert low < figure(LAW) < high and low < figure(found.law) < high
  assert found.law.alpha == pytest.approx(LAW.alpha, abs=0.03) and found.law.beta == pytest.approx(LAW.beta, abs=0.03)
  assert found.residuals[[4, 17]] == pytest.approx(np.log(1.5), abs=0.02)


def test_the_same_seed_gives_the_same_intervals():
  data = runs(noise=0.003)
  first, second, other = (fit(*data, resamples=3, seed=seed) for seed in (0, 0, 1))
  assert first.resampled == second.resampled != other.resampled and len({*first.resampled}) == 3
  assert first.prediction(1e8, 1e10) == second.prediction(1e8, 1e10) != first.prediction(1e8, 1e10, seed=1)


def test_a_prediction_is_wider_than_the_uncertainty_of_the_law():
  found = fit(*runs(noise=0.01), resamples=40)
  loss, (low, high) = found.prediction(1e6, 1e8)  # among the runs, where the law itself is known well
  narrow = found.interval(lambda law: law.loss(np.array([1e6]), np.array([1e8]))[0])
  assert low < narrow[0] < loss < narrow[1] < high and high - low > 0.02 * loss


def test_the_optimum_has_the_lowest_loss_of_its_budget():
  for compute in (1e15, 1e20):
    parameters, tokens = LAW.optimum(compute)
    assert 6 * parameters * tokens == pytest.approx(compute)
    others = parameters * np.linspace(0.5, 2, 1001)
    losses = LAW.loss(others, compute / 6 / others)
    assert others[losses.argmin()] == pytest.approx(parameters, rel=2e-3)
  a, b = LAW.exponents
  assert LAW.optimum(1e20)[0] / LAW.optimum(1e15)[0] == pytest.approx(1e5 ** a) and a + b == pytest.approx(1)


def test_an_irreducible_loss_of_nothing_is_in_doubt_as_well():
  found = fit(*runs(noise=0.01, seed=4, law=dataclasses.replace(LAW, E=1e-3)), resamples=20)
  low, high = found.interval(lambda law: law.E)
  assert found.law.E < 1e-6 and low < 1e-3 < high


def test_starts_that_are_far_away_lead_to_the_same_law():
  data = runs(noise=0.003)
  expected = fit(*data, resamples=0).law
  found = minimized(*data, [Law(0.1, 1.0, 1.0, 1.0, 0.05)])
  assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(expected), rel=1e-3)


@pytest.mark.parametrize('law, exponent', [(EPOCH, 0.78), (CHINCHILLA, 0.74)])
def test_without_embeddings_the_best_models_grow_as_kaplan_found(law, exponent):
  assert kaplan_exponent(law) == pytest.approx(exponent, abs=0.01)
  assert kaplan_exponent(law, omega=0.0) == pytest.approx(law.exponents[0], abs=1e-4)
  assert kaplan_exponent(law, compute=(1e28, 1e30)) == pytest.approx(law.exponents[0], abs=0.01)  # embeddings no longer matter


def test_the_best_model_without_embeddings_is_found_by_search():
  sizes = np.geomspace(1e2, 1e11, 20_001)
  best = [sizes[EPOCH.loss(sizes + 47_491 * sizes ** (1 / 3), compute / 6 / sizes).argmin()] for compute in (1e15, 1e16)]
  assert kaplan_exponent(EPOCH, (1e15, 1e16)) == pytest.approx(np.log10(best[1] / best[0]), abs=2e-3)


@pytest.mark.parametrize('change, error', [
  (lambda n, d, loss: (n[:5], d[:5], loss[:5]), 'runs: 5, expected: 6 or more: the law has five constants'),
  (lambda n, d, loss: (n, d, np.where(n == n.max(), np.nan, loss)), 'loss: nan, expected: a finite number above 0'),
  (lambda n, d, loss: (n, d, np.where(n == n.max(), np.inf, loss)), 'loss: inf, expected: a finite number above 0'),
  (lambda n, d, loss: (n, d, 0 * loss), 'loss: 0.0, expected: a finite number above 0'),
  (lambda n, d, loss: (-n, d, loss), 'N: -[0-9.]+, expected: a finite number above 0'),
  (lambda n, d, loss: (np.where(n > 1e6, 2e6, 1e6), d, loss), 'different N: 2, expected: 3 or more'),
  (lambda n, d, loss: (n, 0 * d + 1e9, loss), 'different D: 1, expected: 3 or more'),
  (lambda n, d, loss: (n, d, 2 + 0.1 * n ** 0.1), 'alpha: 0.01, expected: runs whose loss falls with N, so that a law can be fitted')])
def test_runs_that_determine_no_law_are_refused(change, error):
  with pytest.raises(UserError, match=f'^{error}$'):
    fit(*change(*runs()), resamples=0)


@pytest.mark.full
def test_intervals_hold_the_truth_as_often_as_they_say():
  count, noise, hits = 100, 0.003, dict.fromkeys([*FIGURES, 'prediction'], 0)
  larger, data = np.array([3e7]), np.array([6e8])
  for seed in range(count):
    found = fit(*runs(noise, seed), resamples=50, seed=seed)
    measured = LAW.loss(larger, data)[0] * np.exp(noise * np.random.default_rng(1000 + seed).standard_normal())
    intervals = {name: (found.interval(figure), figure(LAW)) for name, figure in FIGURES.items()}
    intervals['prediction'] = (found.prediction(larger[0], data[0], seed)[1], measured)
    for name, ((low, high), truth) in intervals.items():
      hits[name] += low <= truth <= high
  spread = 3 * np.sqrt(CONFIDENCE * (1 - CONFIDENCE) / count)
  assert all(hits[name] / count == pytest.approx(CONFIDENCE, abs=spread) for name in hits), hits
