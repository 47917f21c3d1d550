"""Row i depends only on (stores, mixture, layout, seed, i), and epochs and evaluations are complete."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from small_stores import make_store, stream

from gptjax.config import UserError
from gptjax.data import EvalRows, Mixture, Packed, TrainRows, Windows
from gptjax.data.rows import best_fit, permute

SHAPES = [([2], 1), ([7], 3), ([4, 3, 5], 4), ([1, 1, 1, 9, 2], 5), ([50, 50], 7), ([5], 16), ([3] * 40 + [60, 1, 13], 10)]


def rows_of(layouts, context, seed=0, weights=None, **mixture):
  counts = [layout.count for layout in layouts]
  return TrainRows(layouts, Mixture(counts, weights or [0.0] * len(counts), **mixture), context, seed, True)


def layout_of(kind, store, context, folder):
  return Windows(store, context) if kind == 'concat' else Packed(store, context, kind, folder / 'cache')


def epoch(rows, number):
  return rows.batch(np.arange(rows.rows_per_epoch) + number * rows.rows_per_epoch)


def targets(batch):
  return batch['targets'][batch['mask'] > 0].tolist()


@pytest.fixture(params=range(len(SHAPES)))
def case(request, tmp_path):
  lengths, context = SHAPES[request.param]
  return make_store(tmp_path / 'store', lengths, shard_documents=2), lengths, context, tmp_path


@pytest.mark.parametrize('kind', ['concat', 'pack', 'document'])
def test_each_token_is_a_target_and_an_input_once_an_epoch(case, kind):
  store, _, context, folder = case
  rows = rows_of([layout_of(kind, store, context, folder)], context)
  for number in (0, 1, 5):
    batch = epoch(rows, number)
    assert sorted(targets(batch)) == sorted(stream(store).tolist())
    assert sorted(batch['tokens'][batch['mask'] > 0].tolist()) == sorted(stream(store).tolist())


@pytest.mark.parametrize('kind', ['concat', 'pack', 'document'])
def test_rows_agree_with_the_documents(case, kind):
  """Against plain Python: what follows each input, how far it is from its document's or row's start, and in which segment."""
  store, lengths, context, folder = case
  ids = stream(store).tolist()
  starts = {0, *itertools.accumulate(lengths)}
  following = dict(zip(ids, [*ids[1:], ids[0]]))
  begins = {ids[start + 1]: start for start in starts if start + 1 < len(ids) and start + 1 not in starts}
  batch = epoch(rows_of([layout_of(kind, store, context, folder)], context), 1)
  names = ('tokens', 'targets', 'positions', 'segments', 'mask')
  for tokens, target, positions, segments, mask in zip(*(batch[name].tolist() for name in names)):
    segment = position = 0
    real = int(sum(mask))
    assert mask == [1.0] * real + [0.0] * (context - real) and segments[real:] == [0] * (context - real)
    for k in range(real):
      first = k == 0 or tokens[k] == 1 or (kind != 'concat' and target[k - 1] == 1)
      segment, position = (segment + 1, 0) if first else (segment, position + 1)
      assert (segments[k], positions[k]) == (segment, position)
      if tokens[k] != 1:
        assert target[k] == following[tokens[k]]
      elif target[k] != 1:
        assert target[k] in begins


def test_packing_splits_no_document_that_fits(case):
  store, lengths, context, folder = case
  batch = epoch(rows_of([layout_of('pack', store, context, folder)], context), 0)
  inputs = [row[mask > 0].tolist() for row, mask in zip(batch['tokens'], batch['mask'])]
  ids = stream(store).tolist()
  for start, length in zip(itertools.accumulate([0, *lengths]), lengths):
    inside = ids[start + 1:start + length]
    holders = {number for number, row in enumerate(inputs) for one in inside if one in row}
    assert len(holders) <= -(-length // context)


def test_one_document_per_row(tmp_path):
  store = make_store(tmp_path / 'store', [3, 12, 5])
  batch = epoch(rows_of([layout_of('document', store, 5, tmp_path)], 5), 0)
  assert sorted(batch['mask'].sum(1).tolist()) == [2, 3, 5, 5, 5] and (batch['segments'].max(1) == 1).all()


@pytest.mark.parametrize('kind', ['concat', 'pack'])
def test_a_row_depends_on_its_index_alone(kind, tmp_path):
  stores = [make_store(tmp_path / str(k), [5 + k] * 30, shard_documents=7) for k in range(3)]
  make = lambda seed=3: rows_of([layout_of(kind, store, 8, tmp_path) for store in stores], 8, seed, [3.0, 2.0, 1.0])
  reference = make().batch(np.arange(300))
  for indices in ([17], [299, 0, 17], np.random.default_rng(0).permutation(300)):
    batch = make().batch(np.asarray(indices))
    assert all((batch[name] == reference[name][indices]).all() for name in reference)
  assert not (make(4).batch(np.arange(300))['tokens'] == reference['tokens']).all()


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
  layout = Windows(make_store(tmp_path / 'store', [400]), 4)
  orders = [epoch(rows_of([layout], 4, seed), number)['tokens'].tobytes() for seed in range(4) for number in range(4)]
  assert len(set(orders)) == 16  # the seed is hashed before the epoch is added


def test_components_of_equal_size_have_different_orders(tmp_path):
  layouts = [Windows(make_store(tmp_path / str(k), [400]), 4) for k in range(2)]
  rows = rows_of(layouts, 4, 0, [1.0, 1.0])
  batch = rows.batch(np.arange(40))
  assert (batch['tokens'][::2] != batch['tokens'][1::2]).any()


def test_distant_rows_are_as_fast_as_the_first(tmp_path):
  layouts = [layout_of(kind, make_store(tmp_path / kind, [9, 30, 4] * 50), 16, tmp_path) for kind in ('concat', 'pack')]
  rows = rows_of(layouts, 16, 0, [0.3, 0.7])
  read = [0]
  for layout in layouts:
    real = layout.store.read
    layout.store.read = lambda starts, counts, *out, real=real: (
      read.__setitem__(0, read[0] + int(np.sum(counts))), real(starts, counts, *out))[1]
  spent = []
  for first in (0, 10**9, 10**15):
    read[0] = 0
    start = time.perf_counter()
    rows.batch(first + np.arange(64))
    spent.append((read[0], time.perf_counter() - start))
  assert max(count for count, _ in spent) <= 64 * 17 * 1.2  # no reading that grows with the index
  assert max(seconds for _, seconds in spent) < 1


def test_evaluation_scores_every_token_once_and_pads_the_rest(case):
  store, _, context, _ = case
  rows = EvalRows(store, context, True)
  batch = rows.batch(np.arange(rows.count + 3))
  assert targets(batch) == [*stream(store).tolist()[1:], 1]
  assert not batch['mask'][rows.count:].any() and not batch['segments'][rows.count:].any()
  assert batch['mask'].sum() == store.tokens


def test_without_isolation_there_are_no_segments(tmp_path):
  store = make_store(tmp_path / 'store', [5, 9])
  assert {*EvalRows(store, 4, False).batch(np.arange(2))} == {'tokens', 'targets', 'mask'}


def test_dtypes_are_as_the_model_expects(case):
  store, _, context, _ = case
  batch = EvalRows(store, context, True).batch(np.arange(1))
  assert {name: values.dtype.name for name, values in batch.items()} == {
    'tokens': 'int32', 'targets': 'int32', 'mask': 'float32', 'positions': 'int32', 'segments': 'int32'}


def test_a_context_far_longer_than_all_documents_needs_no_extra_memory():
  assert best_fit(np.array([3, 5, 4]), 2**31 - 1) == best_fit(np.array([3, 5, 4]), 12) == [[1, 2, 0]]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
  images = permute(np.arange(size), size, np.full(size, key, np.uint64))
  assert sorted(images.tolist()) == list(range(size))


def test_permute_spreads_evenly_over_large_ranges():
  size = 10**12
  images = permute(np.arange(4000), size, np.zeros(4000, np.uint64))
  assert len(set(images.tolist())) == 4000 and 0 <= images.min() and images.max() < size
  counts, _ = np.histogram(images, 8, (0, size))
  assert abs(counts - 500).max() < 120  # 5.7 standard deviations


def test_a_row_beyond_all_epochs_is_refused(tmp_path):
  layout = Windows(make_store(tmp_path / 'store', [40]), 4)
  rows = rows_of([layout], 4, limits=[25])
  assert rows.mixture.rows == 25 and rows.batch(np.array([24]))
  with pytest.raises(UserError, match='25 rows'):
    rows.batch(np.array([25]))
