"""Row i depends on nothing but (store, context, seed, i), and epochs and evaluations leave nothing out."""

import bisect
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from gptjax.data import EvalRows, TokenStore, TrainRows
from gptjax.data.rows import permute

SIZES = [(2, 1), (7, 3), (12, 4), (12, 5), (100, 7), (5, 16), (1000, 10)]


def places_store(size):
  """A store whose token at a place is the place."""
  return TokenStore(Path(), np.arange(size, dtype=np.uint32), np.zeros(1, np.int64), bytes=size, vocab_size=size + 3,
                    pad_id=size, bos_id=size + 1, eos_id=size + 2, sha256='')


def text_store(lengths):
  """A store of documents with so many tokens between bos (1) and eos (2), pad 0."""
  stream = np.concatenate([[1, *range(10, 10 + length), 2] for length in lengths]).astype(np.uint16)
  starts = np.cumsum([0, *(length + 2 for length in lengths[:-1])])
  return TokenStore(Path(), stream, starts, bytes=sum(lengths), vocab_size=2**16, pad_id=0, bos_id=1, eos_id=2,
                    sha256='')


def reference(store, places):
  """What a row over these places of the stream (one more than the context) should be, in plain Python."""
  starts, rows = store.starts.tolist(), {'tokens': [], 'targets': [], 'positions': [], 'segments': [], 'mask': []}
  segment, since = 0, 0
  for k, (place, following) in enumerate(itertools.pairwise(places)):
    if k == 0 or place in starts:
      segment, since = segment + 1, k
    rows['tokens'].append(int(store.tokens[place]))
    rows['targets'].append(int(store.tokens[following]))
    rows['positions'].append(k - since)
    rows['segments'].append(segment)
    same_document = bisect.bisect(starts, place) == bisect.bisect(starts, following) and following == place + 1
    rows['mask'].append(float(same_document))
  return rows


@pytest.mark.parametrize(('size', 'context'), SIZES)
@pytest.mark.parametrize('seed', [0, 1, 2**70])
def test_every_epoch_visits_every_window_once(size, context, seed):
  rows = TrainRows(places_store(size), context, seed)
  n = rows.rows_per_epoch
  assert n == -(-size // context)
  for epoch in range(4):
    batch = rows.batch(epoch * n, n)
    tokens, targets = batch['tokens'], batch['targets']
    assert tokens.shape == targets.shape == (n, context)
    assert ((tokens[:, :1] + np.arange(context)) % size == tokens).all()
    assert ((tokens + 1) % size == targets).all()
    cuts = [{(shift + window * context) % size for window in range(n)} for shift in range(context)]
    assert set(tokens[:, 0].tolist()) in cuts
    assert len(set(tokens[:, 0].tolist())) == len(cuts[0])
    assert set(tokens.ravel().tolist()) == set(range(size))


@given(size=st.integers(2, 300), context=st.integers(1, 40), seed=st.integers(0, 9), first=st.integers(0, 10**13),
       count=st.integers(1, 30))
@settings(max_examples=100, deadline=None, database=None)
def test_rows_do_not_depend_on_the_batch_they_come_in(size, context, seed, first, count):
  store = places_store(size)
  whole = TrainRows(store, context, seed).batch(first, count)
  other = TrainRows(store, context, seed)
  for i in reversed(range(count)):
    one = other.batch(first + i, 1)
    assert all((whole[name][i] == one[name][0]).all() for name in whole)


def test_seeds_and_epochs_have_orders_and_cuts_of_their_own():
  def epoch(seed, number):
    rows = TrainRows(places_store(2000), 10, seed)
    return tuple(rows.batch(number * rows.rows_per_epoch, rows.rows_per_epoch)['tokens'][:, 0].tolist())

  epochs = {(seed, number): epoch(seed, number) for seed in range(6) for number in range(6)}
  assert len(set(epochs.values())) == len(epochs)
  assert len({starts[0] % 10 for starts in epochs.values()}) > 6
  # The order differs too, not the cut alone.
  assert len({tuple(place // 10 for place in starts) for starts in epochs.values()}) == len(epochs)


@pytest.mark.parametrize('size', [*range(1, 20), 63, 64, 65, 1000, 4097])
def test_a_permutation_hits_everything_once(size):
  for key in range(5):
    images = permute(np.arange(size), size, np.full(size, key, np.uint64))
    assert sorted(images.tolist()) == list(range(size))


def test_permutations_are_spread_over_all_orders():
  orders = {tuple(permute(np.arange(3), 3, np.full(3, key, np.uint64)).tolist()) for key in range(300)}
  assert len(orders) == 6


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8), context=st.integers(1, 20), seed=st.integers(0, 5),
       first=st.integers(0, 50))
@settings(max_examples=150, deadline=None, database=None)
def test_rows_are_what_plain_python_says(lengths, context, seed, first):
  store = text_store(lengths)
  starts = TrainRows(places_store(len(store.tokens)), context, seed).batch(first, 3)['tokens'][:, 0]
  batch = TrainRows(store, context, seed).batch(first, 3)
  for i, start in enumerate(starts):
    expected = reference(store, [(int(start) + k) % len(store.tokens) for k in range(context + 1)])
    assert {name: array[i].tolist() for name, array in batch.items()} == expected


def test_a_batch_has_the_types_a_model_takes():
  batch = TrainRows(text_store([5, 9]), 4, 0).batch(0, 2)
  assert {name: array.dtype.name for name, array in batch.items()} == {
      'tokens': 'int32', 'targets': 'int32', 'positions': 'int32', 'segments': 'int32', 'mask': 'float32'}
  assert all(array.shape == (2, 4) and array.flags.c_contiguous for array in batch.values())


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=8), context=st.integers(1, 20))
@settings(max_examples=150, deadline=None, database=None)
def test_evaluation_has_every_token_but_bos_as_a_target_once(lengths, context):
  store = text_store(lengths)
  rows = EvalRows(store, context)
  batch = rows.batch(np.arange(rows.count))
  counted = batch['mask'] == 1
  assert batch['targets'][counted].tolist() == store.tokens[store.tokens != 1].tolist()
  assert counted.sum() == store.targets
  assert rows.bytes == store.bytes
  assert (batch['targets'][~counted] <= 1).all()
  assert (batch['targets'][counted] > 1).all()
  assert ((batch['segments'] == 0) == (batch['tokens'] == 0)).all()
  assert batch['mask'][-1].any()
  for row in range(rows.count - 1):
    expected = reference(store, range(row * context, (row + 1) * context + 1))
    assert {name: array[row].tolist() for name, array in batch.items()} == expected


def test_evaluation_rows_come_in_any_order_and_padding_after_the_last():
  rows = EvalRows(text_store([30, 3, 7]), 8)
  whole = rows.batch(np.arange(rows.count))
  picked = rows.batch(np.array([3, 0, rows.count, 10**6]))
  for name in whole:
    assert (picked[name][:2] == whole[name][[3, 0]]).all()
  for name in ('tokens', 'targets', 'segments', 'mask'):
    assert not picked[name][2:].any()
