"""A store in object storage reads like a local one, tested with an S3 server."""

import pickle

import fsspec
import numpy as np
import pytest
from object_store import s3_server
from small_stores import make_store, stream

from gptjax.config import Component, DataConfig, UserError, ValidationSet
from gptjax.data import EvalRows, TokenStore, export, open_held_out, prepare
from gptjax.data.folders import Folder, open_folder


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  """A store here and the same on s3://."""
  folder = tmp_path_factory.mktemp('stores') / 'store'
  make_store(folder, [5, 9000, 1, 30, 12000, 7], shard_documents=2, vocab_size=259, draw=lambda n: np.arange(n) % 250 + 3)
  with s3_server() as system:
    system.mkdir('stores')
    system.put(f'{folder}/', 'stores/store/', recursive=True)
    yield str(folder), 's3://stores/store'


def test_the_name_of_a_folder_is_no_pattern(tmp_path):
  system = fsspec.filesystem('memory')
  for name in ('lr[1-3]', 'lr*', 'lr1', 'é %20#'):
    system.pipe_file(f'/names/{name}/tokenizer/sub/file', name.encode())
    (tmp_path / name / 'tokenizer' / 'sub').mkdir(parents=True)
    (tmp_path / name / 'tokenizer' / 'sub' / 'file').write_text(name)
  for root in ('memory://names', str(tmp_path)):
    for name in ('lr[1-3]', 'lr*', 'é %20#'):
      copy = tmp_path / 'copy' / root[:3] / name
      open_folder(f'{root}/{name}').copy(copy)
      assert {str(path.relative_to(copy)): path.read_text() for path in copy.rglob('*') if path.is_file()} == {'tokenizer/sub/file': name}
      assert (open_folder(f'{root}/{name}').local('tokenizer') / 'sub' / 'file').read_text() == name


@pytest.mark.full
def test_a_remote_store_is_read_by_ranges_and_verified(stores, monkeypatch):
  here, there = map(TokenStore.open, stores)
  asked, ranges = [], Folder.ranges
  monkeypatch.setattr(Folder, 'ranges', lambda self, wanted: (asked.append(wanted), ranges(self, wanted))[1])
  rng = np.random.default_rng(0)
  starts, counts = rng.integers(0, here.tokens, 20), rng.integers(1, 400, 20)
  assert (pickle.loads(pickle.dumps(there)).read(starts, counts) == here.read(starts, counts)).all()
  calls = [call for call in asked if len(call) > 1]
  assert len(calls) == 2 and len(calls[1]) >= 20  # the checksums of all shards, then all ranges of a batch, at once
  assert (stream(there) == stream(here)).all() and (there.starts(1, 5) == here.starts(1, 5)).all()
  there.check()
  there.verify()


@pytest.mark.full
def test_a_remote_store_trains_and_its_validation_documents_are_copied(stores, tmp_path):
  data = DataConfig(train=(Component(stores[1]),), valid=(ValidationSet('v', stores[1]),), rows='pack', context=64)
  prepared = prepare(data, tmp_path / 'cache')
  assert prepared.layouts[0].count > 300
  export(prepared, tmp_path / 'data')
  kept = open_held_out(tmp_path / 'data')
  assert kept.valid['v'].sha256 == prepared.valid['v'].sha256 and '://' not in kept.valid['v'].location
  batch = EvalRows(kept.valid['v'], 64, True).batch(np.arange(3))
  assert all((batch[name] == EvalRows(prepared.valid['v'], 64, True).batch(np.arange(3))[name]).all() for name in batch)


@pytest.mark.full
@pytest.mark.parametrize('damage', ['truncated', 'flipped'])
def test_errors_name_a_damaged_remote_shard(stores, damage):
  import s3fs
  system, name = s3fs.S3FileSystem(), 'stores/store/00001.shard'
  undamaged = system.cat_file(name)
  system.pipe(name, undamaged[:-9] if damage == 'truncated' else bytes([undamaged[0] ^ 1]) + undamaged[1:])
  try:
    with pytest.raises(UserError, match=r'^s3://stores/store/00001.shard: .*restore it'):
      s3fs.S3FileSystem.clear_instance_cache()
      store = TokenStore.open(stores[1])
      store.check()
      stream(store)
  finally:
    system.pipe(name, undamaged)


@pytest.mark.full
@pytest.mark.parametrize('place', ['s3://stores/nothing', 's3://no-bucket/store', 'nosuch://bucket/store'])
def test_a_missing_store_is_one_line(stores, place):
  with pytest.raises(UserError, match=f"^token store: '{place}', expected: "):
    TokenStore.open(place)
