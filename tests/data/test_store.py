"""A store returns what was written, reports what is damaged, and takes constant time to open."""

import hashlib
import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from small_stores import FIRST, make_store, stream

from gptjax.config import UserError
from gptjax.data import folders
from gptjax.data.store import BLOCK, RECORD, TokenStore, manifest_sha256

LENGTHS = [5, 1, 9000, 40, 3, 17000, 12]


@pytest.fixture(params=[2**16 + 1, 2**16])
def store(request, tmp_path):
  return make_store(tmp_path / 'store', LENGTHS, shard_documents=3, vocab_size=request.param)


def expected(lengths=LENGTHS):
  ids = np.arange(FIRST, FIRST + sum(lengths))
  ids[np.cumsum(lengths) - lengths] = 1
  return ids


def test_ranges_of_the_circular_stream(store):
  ids = expected()
  rng = np.random.default_rng(0)
  starts = rng.integers(0, len(ids), 200)
  counts = rng.integers(0, len(ids) + 5, 200)
  thrice = np.concatenate([ids, ids, ids])
  assert (store.read(starts, counts) == np.concatenate([thrice[a:a + n] for a, n in zip(starts, counts)])).all()
  assert store.dtype == ('<u4' if store.vocab_size > 2**16 else '<u2')


def test_positions_of_documents(store):
  places = np.cumsum([0, *LENGTHS])
  for first in range(len(LENGTHS)):
    for stop in range(first + 1, len(LENGTHS) + 1):
      assert store.starts(first, stop).tolist() == places[first:stop + 1].tolist()


def test_a_copy_in_another_process_reads_the_same(store):
  assert (stream(pickle.loads(pickle.dumps(store))) == stream(store)).all()


def flip(path, place):
  data = bytearray(path.read_bytes())
  data[place] ^= 1
  path.write_bytes(data)


def test_every_flipped_byte_is_found_before_it_is_used(store):
  path, shard = store.location, store._shard(1)
  file = Path(path) / shard.name
  for place in (0, shard.stop - 1, BLOCK + 3, shard.starts + 9, shard.sums + 1):
    flip(file, place)
    damaged = TokenStore.open(path)
    with pytest.raises(UserError, match=rf'{shard.name}'):
      stream(damaged)
      damaged.starts(0, damaged.documents)
    with pytest.raises(UserError, match=rf'{shard.name}.*restore it'):
      damaged.verify()
    flip(file, place)
  TokenStore.open(path).verify()
  assert (stream(TokenStore.open(path)) == expected()).all()


def test_only_rows_on_damaged_blocks_fail(store):
  flip(Path(store.location) / '00001.shard', 3)
  damaged = TokenStore.open(store.location)
  assert (damaged.read([0], [9000]) == expected()[:9000]).all()
  with pytest.raises(UserError, match='00001.shard'):
    damaged.read([9000], [100])


@pytest.mark.parametrize('damage', ['truncate', 'remove', 'empty', 'index', 'manifest', 'deep manifest', 'version'])
def test_an_incomplete_store_is_rejected_before_training(store, damage):
  folder = Path(store.location)
  match damage:
    case 'truncate':
      (folder / '00002.shard').write_bytes((folder / '00002.shard').read_bytes()[:-1])
    case 'remove':
      (folder / '00002.shard').unlink()
    case 'empty':
      (folder / '00002.shard').write_bytes(b'')
    case 'index':
      flip(folder / 'index.bin', 3)
    case 'manifest':
      (folder / 'manifest.json').write_text('{"version": 1')
    case 'deep manifest':
      (folder / 'manifest.json').write_text('[' * 100_000)
    case 'version':
      manifest = json.loads((folder / 'manifest.json').read_text())
      (folder / 'manifest.json').write_text(json.dumps(manifest | {'version': 0}))
  named = {'index': 'index.bin', 'manifest': 'manifest.json: .*JSON', 'deep manifest': 'manifest.json: .*JSON', 'version': 'version'}
  with pytest.raises(UserError, match=named.get(damage, '00002.shard')):
    TokenStore.open(folder).check()


def test_opening_does_not_grow_with_the_store(tmp_path):
  """A store of 10^12 ids: the manifest says so, the shards are not there, and nothing misses them."""
  make_store(tmp_path / 'store', [10, 10])
  shards = 3726
  index = np.zeros(shards, RECORD)
  index['tokens'] = np.arange(1, shards + 1) * 2**28
  index['documents'] = np.arange(1, shards + 1) * 10**6
  (tmp_path / 'store/index.bin').write_bytes(index.tobytes())
  manifest = json.loads((tmp_path / 'store/manifest.json').read_text())
  manifest |= {'tokens': shards * 2**28, 'documents': shards * 10**6, 'index_sha256': hashlib.sha256(index.tobytes()).hexdigest()}
  (tmp_path / 'store/manifest.json').write_text(json.dumps(manifest | {'sha256': manifest_sha256(manifest)}))
  TokenStore.open(tmp_path / 'store')
  tracemalloc.start()
  store = TokenStore.open(tmp_path / 'store')
  pieces = list(store._pieces(np.array([10**12 - 7]), np.array([1000]), np.array([0])))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert store.tokens > 10**12 and pieces[0][0].name == '03725.shard'
  assert peak < 2**21  # the index: 80 bytes a shard, half a gigabyte of ids each


def test_resident_pages_are_released(tmp_path, monkeypatch):
  """What a map holds in memory is bounded, however much of the store was read."""
  store = make_store(tmp_path / 'store', [2**23])

  def resident():
    lines = iter(Path('/proc/self/smaps').read_text().splitlines())
    return sum(int(next(line for line in lines if line.startswith('Rss:')).split()[1]) for line in lines if '00000.shard' in line)

  stream(store)
  assert resident() >= 2**15  # kB: all ids
  monkeypatch.setattr(folders, '_MAX_RESIDENT', 2**18)
  for start in range(0, 2**23, 10_000):
    store.read([start], [500])
  assert resident() < 2**14  # some systems map 2 MB at a touch
