"""A mixture takes every component's rows in order, consecutively, and as evenly as the weights allow."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from gptjax.config import UserError
from gptjax.data import Mixture
from gptjax.data.mixture import CYCLE


def dealt(mixture, rows):
  """Component of each row, after the check that each component's rows come in order without a gap."""
  components, indices = mixture.locate(np.arange(rows))
  for component in np.unique(components):
    assert (indices[components == component] == np.arange((components == component).sum())).all()
  return components


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), rows=st.integers(1, 5000))
def test_every_prefix_has_the_fractions_of_the_weights(weights, rows):
  components = dealt(Mixture([10] * len(weights), weights), rows)
  shares = np.array(weights) / sum(weights)
  counts = np.bincount(components, minlength=len(weights))
  assert abs(counts - shares * rows).max() <= 2 + rows * len(weights) / CYCLE


def test_weights_default_to_the_sizes():
  counts = np.bincount(dealt(Mixture([300, 100], [0.0, 0.0]), 4000))
  assert counts.tolist() == [3000, 1000]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_limits_and_phases_agree_with_counting_row_by_row(data):
  """Row by row: a component past its limit gets nothing, weights are those of the phase, and nothing is skipped."""
  n = data.draw(st.integers(1, 4))
  weights = st.lists(st.sampled_from([0.0, 1.0, 2.5, 7.0]), min_size=n, max_size=n).filter(any)
  first = data.draw(st.lists(st.sampled_from([1.0, 2.5, 7.0]), min_size=n, max_size=n))
  limits = data.draw(st.lists(st.sampled_from([0, 7, 50, 400]), min_size=n, max_size=n))
  starts = sorted(data.draw(st.sets(st.integers(1, 900), max_size=3)))
  phases = [(start, data.draw(weights)) for start in starts]
  mixture = Mixture([100] * n, first, limits, phases)
  rows = 1500 if mixture.rows is None else min(mixture.rows, 1500)
  components = dealt(mixture, rows) if rows else np.zeros(0, int)
  taken = np.zeros(n, int)
  for row, component in enumerate(components):
    weights_now = ([first] + [w for start, w in phases if start <= row])[-1]
    assert weights_now[component] > 0
    taken[component] += 1
    assert not limits[component] or taken[component] <= limits[component]
  if mixture.rows is not None and mixture.rows <= 1500:
    weights_now = ([first] + [w for start, w in phases if start <= mixture.rows])[-1]
    assert all(not weight or (limit and count >= limit) for weight, limit, count in zip(weights_now, limits, taken))


def test_the_rows_of_a_finished_component_go_to_the_others():
  mixture = Mixture([100, 100, 100], [2.0, 1.0, 1.0], [10, 0, 0])
  components = dealt(mixture, 2000)
  assert (components == 0).sum() == 10 and (components[:20] == 0).sum() == 10
  assert abs((components[20:] == 1).mean() - 0.5) < 0.01


def test_distant_rows_are_located_directly():
  mixture = Mixture([10, 10], [1.0, 3.0], [0, 0], [(1000, [3.0, 1.0])])
  components, indices = mixture.locate(np.arange(10**15, 10**15 + 4 * CYCLE))
  assert abs((components == 0).mean() - 0.75) < 1e-4
  assert abs(indices[components == 0][0] / (0.75 * 10**15) - 1) < 1e-9


def test_enormous_numbers_are_numbers():
  mixture = Mixture([10, 10], [1e308, 1e308], [0, 0], [(10**40, [0.0, 1.0])])
  assert np.bincount(dealt(mixture, 100)).tolist() == [50, 50]


@pytest.mark.parametrize('starts', [[0], [5, 5], [9, 3]])
def test_phases_start_one_after_another(starts):
  with pytest.raises(UserError, match=r'^data.phases: start'):
    Mixture([10], [1.0], [0], [(start, [1.0]) for start in starts])
