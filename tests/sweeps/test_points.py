"""Points combine as sets do, and random ones are what their seed makes them."""

import itertools
import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from gptjax.config import UserError
from gptjax.sweeps import Choice, LogUniform, Uniform, chain, defaults, draws, product, sample, seeds, values, zipped

FIELDS = st.sampled_from(['a', 'b', 'c.d', 'e'])
POINTS = st.lists(st.dictionaries(FIELDS, st.integers(0, 2), max_size=3), max_size=5)


def as_set(points):
  return {frozenset(point.items()) for point in points}


@given(st.lists(POINTS, max_size=3))
def test_chain_is_the_union_in_order(parts):
  found = chain(*parts)
  assert as_set(found) == set().union(*map(as_set, parts)) and len(found) == len(as_set(found))
  everything = [frozenset(point.items()) for points in parts for point in points]
  assert [frozenset(point.items()) for point in found] == list(dict.fromkeys(everything))


@given(st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=3))
def test_product_is_that_of_sets(parts):
  axes = [values(f'field{number}', *options) for number, options in enumerate(parts)]
  found = product(*axes)
  assert as_set(found) == {frozenset((f'field{number}', value) for number, value in enumerate(one))
                           for one in itertools.product(*map(set, parts))}
  assert as_set(product(*axes, [{}])) == as_set(found) and product(*axes, []) == []
  assert as_set(product(product(*axes[:2]), *axes[2:])) == as_set(found)


@given(st.lists(st.integers(0, 9), max_size=5, unique=True), st.integers(0, 3))
def test_zipped_takes_points_together(options, seed):
  other = [{'b': f'x{value}'} for value in options]
  assert zipped(values('a', *options), other) == [{'a': value, 'b': f'x{value}'} for value in options]
  with pytest.raises(UserError, match='parts of one length'):
    zipped(values('a', *options), [*other, {'b': 0}])


@given(POINTS, st.integers(0, 9))
def test_defaults_and_samples(points, count):
  points = chain(points)
  assert as_set(defaults(points, c__d=7)) == as_set({'c.d': 7, **point} for point in points)
  some = sample(points, count, seed=3)
  assert len(some) == min(count, len(points)) and some == [point for point in points if point in some]
  assert some == sample(points, count, seed=3)


def test_a_field_is_given_once():
  with pytest.raises(UserError, match=r'a: \[1, 2\], expected: a field in one of the parts'):
    product(values('a', 1), values('a', 2))
  assert seeds(3) == [{'seed': 0}, {'seed': 1}, {'seed': 2}]


def test_draws_are_different_reproducible_and_of_their_distributions():
  space = {'rate': LogUniform(1e-4, 1e-1), 'width': LogUniform(8, 512, integer=True), 'x': Uniform(-1, 1), 'kind': Choice('a', 'b')}
  found = draws(2000, space, seed=1)
  assert found == draws(2000, space, seed=1) and found[:10] == draws(10, space, seed=1) and len(as_set(found)) == 2000
  logs, widths, xs = (np.array([point[name] for point in found]) for name in ('rate', 'width', 'x'))
  assert 1e-4 <= logs.min() and logs.max() <= 1e-1 and np.median(logs) == pytest.approx(10**-2.5, rel=0.2)
  assert widths.dtype == int and {8, 512} <= {*widths} and np.median(widths) == pytest.approx(64, rel=0.15)
  assert abs(xs.mean()) < 0.05 and {point['kind'] for point in found} == {'a', 'b'}
  assert len(draws(10, {'kind': Choice('a', 'b')})) == 2  # there are no more
  json.dumps(found)


@pytest.mark.parametrize('make', [lambda: LogUniform(0, 1), lambda: Uniform(2, 1), lambda: Choice(), lambda: Uniform(0, float('inf'))])
def test_mistakes(make):
  with pytest.raises(UserError):
    make()
