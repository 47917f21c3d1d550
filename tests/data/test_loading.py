"""The rows on devices depend only on the row's index."""

import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
from small_stores import make_store

from gptjax.data import Mixture, Packed, TrainRows, Windows, batches

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def stores(tmp_path_factory):
  """Three stores of documents of many lengths."""
  folder, rng = tmp_path_factory.mktemp('stores'), random.Random(0)
  for name in 'abc':
    make_store(folder / name, [rng.randrange(1, 60) for _ in range(120)], shard_documents=50, vocab_size=259,
               draw=lambda count: [rng.randrange(3, 259) for _ in range(count)])
  return folder


@pytest.fixture
def rows(stores, tmp_path):
  from gptjax.data import TokenStore
  layouts = [Packed(TokenStore.open(stores / 'a'), 32, 'pack', tmp_path),
             Windows(TokenStore.open(stores / 'b'), 32)]
  return TrainRows(layouts, Mixture([layout.count for layout in layouts], [2.0, 1.0]), 32, 0, True)


@pytest.mark.parametrize('prefetch, workers', [(0, 0), (1, 0), (4, 0), (2, 2)])
def test_prefetched_batches_equal_batches_made_on_request(rows, prefetch, workers):
  if workers:
    from absl import flags  # Grain hands the flags of a process to its workers
    flags.FLAGS.mark_as_parsed()
  mine = np.array([1, 2, 5])
  feed = batches(rows, 12, 6, mine, prefetch=prefetch, workers=workers)
  for step in range(5):
    got, want = next(feed), rows.batch(12 + 6 * step + mine)
    assert {*got} == {*want} and all((got[name] == want[name]).all() and got[name].dtype == want[name].dtype for name in want)


RECIPE = """
from gptjax.config import *

def get_config():
  store = lambda name: {folder!r} + '/' + name
  return Config(
    data=DataConfig(train=tuple(Component(store(name), weight) for name, weight in (('a', 3), ('b', 2), ('c', 1))),
                    valid=(ValidationSet('v', store('a')),), rows='pack', context=32,
                    phases=(Phase('2000 tokens', (1, 1, 1)),)), batch_size=8)
"""


def feed(folder, *flags, processes=1, devices=8):
  """Row to digest, over all processes."""
  out = folder / f'rows-{len(list(folder.iterdir()))}'
  launch = [sys.executable, '-m', 'tools.launch.local', f'--processes={processes}', f'--devices={devices // processes}', '--']
  command = [sys.executable, '-m', 'tools.feed', f'--config={folder}/recipe.py', f'--out={out}', f'--cache_dir={folder}/cache', *flags]
  done = subprocess.run([*launch, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  found = {}
  for process in range(processes):
    file = folder / (f'{out.name}.{process}' if processes > 1 else out.name)
    lines = [line.split() for line in file.read_text().splitlines()]
    assert lines and not found.keys() & {int(row) for row, _ in lines}  # each row is on one process
    found |= {int(row): digest for row, digest in lines}
  return found


def test_rows_are_the_same_over_processes_prefetching_restarts_and_batch_sizes(stores, tmp_path):
  (tmp_path / 'recipe.py').write_text(RECIPE.format(folder=str(stores)))
  reference = feed(tmp_path, '--steps=20')
  assert sorted(reference) == list(range(160)) and len({*reference.values()}) > 100
  two = feed(tmp_path, '--steps=20', '--config.data.prefetch=0', processes=2)
  assert two == reference
  restarted = feed(tmp_path, '--steps=4', '--first_row=56', '--config.batch_size=24', '--config.mesh.data=4', '--config.mesh.model=2',
                   '--config.data.workers=1')
  assert restarted == {row: reference[row] for row in range(56, 152)}
