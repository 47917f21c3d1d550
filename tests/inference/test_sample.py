"""Samples against the distribution in plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full

from gptjax.config import UserError
from gptjax.inference import Sampling, sample
from gptjax.inference.sampling import _narrowed, penalized, per_row

pytestmark = pytest.mark.usefixtures('one_device')

compiled = jax.jit(sample)
LOGITS = np.array([1.2, -0.4, 2.0, 0.3, -1.6, 1.9, -1.1, 0.9], np.float32)


def distribution(logits, sampling):
  """Probability of each id: tempered, cut to the top k, then to the fewest most likely ids that reach top_p and to min_p."""
  order = np.argsort(-logits)
  kept = order[:sampling.top_k or None]
  weights = np.exp((logits[kept] - logits.max()).astype(np.float64) / sampling.temperature)
  weights /= weights.sum()
  count = 1
  while count < len(kept) and (sampling.top_p == 1 or weights[:count].sum() < sampling.top_p):
    count += 1
  probabilities = np.zeros(len(logits))
  probabilities[kept[:count]] = weights[:count]
  probabilities[probabilities < sampling.min_p * weights[0]] = 0
  return probabilities / probabilities.sum()


def keys_of(seed, count):
  return jax.random.split(jax.random.key(seed), count)


def draws(logits, sampling, seed, count=20_000):
  rows = jnp.broadcast_to(jnp.asarray(logits), (count, len(logits)))
  return np.asarray(compiled(rows, per_row(sampling, count), keys_of(seed, count)))


@pytest.mark.parametrize('sampling', [
    full(Sampling(1.0)), full(Sampling(0.5)), Sampling(3.0), full(Sampling(1.0, top_k=1)), full(Sampling(1.0, top_k=3)),
    Sampling(0.7, top_k=7), full(Sampling(1.0, top_k=8)), Sampling(1.0, top_k=100), full(Sampling(1.0, top_p=0.9)),
    full(Sampling(1.0, top_p=0.5)), Sampling(2.0, top_p=0.8), Sampling(1.0, top_p=0.01), full(Sampling(1.0, top_k=3, top_p=0.8)),
    Sampling(1.5, top_k=5, top_p=0.95), full(Sampling(1.0, min_p=0.3)), Sampling(2.0, min_p=0.5),
    Sampling(1.0, top_k=6, top_p=0.99, min_p=0.2),
], ids=str)
def test_samples_follow_the_distribution(sampling):
  probabilities = distribution(LOGITS, sampling)
  frequencies = np.bincount(draws(LOGITS, sampling, 0), minlength=8) / 20_000
  np.testing.assert_array_equal(frequencies > 0, probabilities > 0)
  error = 5 * np.sqrt(probabilities * (1 - probabilities) / 20_000)
  assert (np.abs(frequencies - probabilities) <= error).all()


@pytest.mark.parametrize(
    'sampling', [Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.9), Sampling(0.0)], ids=str)
def test_an_id_of_no_probability_is_never_drawn(sampling):
  logits = LOGITS.copy()
  logits[[2, 5]] = -np.inf  # the two most likely
  assert not np.isin(draws(logits, sampling, 1), [2, 5]).any()


def test_top_k_and_top_p_hold_for_each_row_by_itself():
  rows = np.stack([np.roll(LOGITS, shift) for shift in range(8)])
  best = np.argsort(-rows, -1)[:, :2]
  for sampling in (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5)):
    drawn = [np.asarray(compiled(rows, per_row(sampling, 8), keys_of(seed, 8))) for seed in range(30)]
    assert all((best == each[:, None]).any(1).all() for each in drawn)
    assert len({each.tobytes() for each in drawn}) > 20


@pytest.mark.parametrize('spread, wide', [  # the 1,024 most likely of 3,000 ids suffice, or do not
  (5.0, []), (0.1, []), (5.0, [Sampling(1.0, top_k=2000), Sampling(0.5, top_k=1500, top_p=0.999)])])
def test_each_of_many_rows_has_settings_of_its_own(spread, wide):
  settings = [Sampling(1.0), Sampling(0.0), Sampling(1.0, top_k=5), Sampling(2.0, top_p=0.9), Sampling(1.0, top_p=0.3, min_p=0.5),
              Sampling(1.0, min_p=0.97), *wide]
  count = len(settings)
  logits = spread * np.random.default_rng(0).standard_normal((len(settings), 3000), np.float32)
  rows = {name: np.concatenate([per_row(one, 1)[name] for one in settings]) for name in per_row(Sampling(), 1)}
  kept = np.array([distribution(row, one) > 0 if one.temperature else row == row.max() for row, one in zip(logits, settings, strict=True)])
  for seed in range(20):
    drawn = np.asarray(compiled(logits, rows, keys_of(seed, count)))
    assert kept[np.arange(count), drawn].all()
    alone = compiled(logits[3:4], {name: values[3:4] for name, values in rows.items()}, keys_of(seed, count)[3:4])
    assert alone[0] == drawn[3]
  scaled = np.array([row - row.max() for row in logits]) / np.maximum([[one.temperature] for one in settings], 1e-30)
  found = np.isfinite(np.asarray(jax.jit(_narrowed)(scaled.astype(np.float32), rows)))
  assert (found == kept)[[index for index, one in enumerate(settings) if one.temperature]].all()


@pytest.mark.parametrize('sampling', [
  Sampling(0.0), Sampling(0.0, top_k=3), Sampling(0.0, top_p=0.1), Sampling(1e-39), Sampling(1e-30, top_p=0.9)], ids=str)
def test_temperature_0_takes_the_most_likely_id(sampling):
  logits = np.random.default_rng(2).standard_normal((50, 30), np.float32)
  for seed in (0, 1):
    np.testing.assert_array_equal(compiled(logits, per_row(sampling, 50), keys_of(seed, 50)), logits.argmax(-1))


def test_a_penalty_divides_positive_logits_and_multiplies_negative_ones():
  seen = np.array([True, True, False, True, True, False, False, False])
  found = penalized(jnp.asarray(LOGITS)[None], jnp.asarray(seen)[None], jnp.array([2.0]))[0]
  np.testing.assert_allclose(found, [0.6, -0.8, 2.0, 0.15, -3.2, 1.9, -1.1, 0.9])


def test_equal_keys_give_equal_samples_and_other_keys_others():
  one, again, other = (draws(LOGITS, Sampling(), seed, 100) for seed in (3, 3, 4))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()


@pytest.mark.parametrize('values, message', [
    ({'temperature': -0.1}, '--temperature: -0.1, expected: a number of at least 0'),
    ({'temperature': float('nan')}, '--temperature: nan, expected: a number of at least 0'),
    ({'temperature': float('inf')}, '--temperature: inf, expected: a number of at least 0'),
    ({'top_k': -1}, '--top_k: -1, expected: 0 or more'),
    ({'top_p': 0.0}, '--top_p: 0.0, expected: above 0 and at most 1'),
    ({'top_p': 1.1}, '--top_p: 1.1, expected: above 0 and at most 1'),
    ({'min_p': 1.5}, '--min_p: 1.5, expected: 0 to 1'),
    ({'repetition_penalty': 0.0}, '--repetition_penalty: 0.0, expected: a number above 0'),
])
def test_invalid_settings_are_an_error(values, message):
  with pytest.raises(UserError) as caught:
    Sampling(**values)
  assert str(caught.value) == message
