"""The best model of each budget is the minimum of its parabola, and the power law goes through these minima."""

import numpy as np
import pytest

from experiments.scaling_law.isoflop import groups, isoflop

BUDGETS = np.array([1e14, 1e15, 1e16])
BEST = 0.05 * BUDGETS ** 0.48


def parabolas(best=BEST, noise=0.0, seed=0):
  """N, C and losses of seven models for each budget, in mixed order; FLOPs differ by a few percent, as whole steps make them."""
  rng = np.random.default_rng(seed)
  parameters = (BEST[:, None] * np.geomspace(0.2, 4, 7)).ravel()
  compute = np.repeat(BUDGETS, 7) * rng.uniform(0.98, 1.02, 21)
  loss = 3 - 0.1 * np.log10(np.repeat(BUDGETS, 7)) + 0.05 * np.log(parameters / np.repeat(best, 7)) ** 2
  order = rng.permutation(21)
  return parameters[order], compute[order], (loss + noise * rng.standard_normal(21))[order]


def test_exact_parabolas_give_their_minima_and_exponent_without_doubt():
  found = isoflop(*parabolas(), resamples=40)
  assert [one.best for one in found.budgets] == pytest.approx(BEST, rel=1e-9)
  assert [one.compute for one in found.budgets] == pytest.approx(BUDGETS, rel=0.02)
  assert [one.interval for one in found.budgets] == [pytest.approx((best, best), rel=1e-9) for best in BEST]
  assert found.exponent == pytest.approx(0.48, abs=5e-3) and found.interval == pytest.approx((found.exponent, found.exponent))
  parameters, compute, loss = parabolas()
  for one in found.budgets:
    assert one.loss(parameters[one.runs]) == pytest.approx(loss[one.runs]) and np.ptp(np.log(compute[one.runs])) < 0.05
    assert found.factor * one.compute ** found.exponent == pytest.approx(one.best, rel=0.03)


def test_with_noise_the_truth_is_in_the_intervals():
  found = isoflop(*parabolas(noise=0.005), resamples=300)
  assert all(one.interval[0] < best < one.interval[1] for one, best in zip(found.budgets, BEST))
  assert found.interval[0] < 0.48 < found.interval[1] and 0.01 < found.interval[1] - found.interval[0] < 0.2
  again, other = (isoflop(*parabolas(noise=0.005), resamples=300, seed=seed) for seed in (0, 1))
  assert again.interval == found.interval != other.interval


@pytest.mark.full
def test_intervals_hold_the_truth_as_often_as_they_say():
  found = [isoflop(*parabolas(noise=0.005, seed=seed), resamples=300, seed=seed) for seed in range(300)]
  hits = [one.interval[0] <= 0.48 <= one.interval[1] for one in found]
  assert np.mean(hits) == pytest.approx(0.95, abs=0.04)


def test_a_budget_whose_curve_has_no_minimum_among_its_models_does_not_count():
  best = BEST * [1, 1, 50]
  found = isoflop(*parabolas(best), resamples=40)
  assert [one.has_minimum for one in found.budgets] == [True, True, False]
  assert found.exponent == pytest.approx(0.48, abs=0.02)
  parameters, compute, loss = parabolas(best)
  upside_down = isoflop(parameters, compute, 5 - loss, resamples=40)
  assert not any(one.has_minimum for one in upside_down.budgets) and np.isnan([upside_down.exponent, *upside_down.interval]).all()


def test_budgets_with_few_models_are_left_out():
  parameters, compute, loss = parabolas()
  order = np.argsort(compute)[4:]  # three models of the first budget
  found = isoflop(parameters[order], compute[order], loss[order], resamples=40)
  assert [one.compute for one in found.budgets] == pytest.approx(BUDGETS[1:], rel=0.02)
  seeds = isoflop(np.repeat(parameters[:3], 3), np.repeat(compute[:3], 3), np.repeat(loss[:3], 3))  # runs of one model, no others
  assert seeds.budgets == [] and np.isnan(seeds.exponent)


def test_runs_are_grouped_by_budget_from_the_smallest_on():
  found = groups(np.array([3e15, 1e14, 1.04e14, 2.9e15, 0.97e14, 1e20]))
  assert [sorted(runs) for runs in found] == [[1, 2, 4], [0, 3], [5]]
