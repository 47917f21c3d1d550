"""Trains as gptjax.train does, and keeps what each process hands over to be saved, and what it resumes from, to compare the two.

  python -m tests.acceptance.kept_state --config=... --workdir=DIR

writes DIR/saved-STEP.PROCESS.npz with the parts of every array that the devices of this process hold, in the layout of checkpoints, and
restored-STEP.PROCESS.npz, with what the state of the run is in that layout; in rows.PROCESS a line for each row that they were given: its
batch, counted from the start, its place in it, and its digest; and in
hashed-PROCESSES.PROCESS the files that it read to know their checksums.
"""

import itertools
import json
from pathlib import Path

import numpy as np
from absl import flags

from gptjax import config as configs
from gptjax import train
from gptjax.distributed import process_group
from tools.row_digests import digests


def main(config: configs.Config) -> int:
  from gptjax.checkpoint import Checkpoints, manifest
  from gptjax.training import batches, loop
  save, restore, digest = Checkpoints.save, loop.restore, manifest._digest

  def keep_and_save(self, progress, state, *more, **named):
    _keep(f'saved-{progress.step}', state)
    save(self, progress, state, *more, **named)

  def restore_and_keep(checkpoints, step, run):
    state, progress = restore(checkpoints, step, run)
    _keep(f'restored-{step}', run.standard.saved(state))
    return state, progress

  numbers, place = itertools.count(), batches.put_rows

  def place_and_tell(mesh, batch, size):
    placed, number = place(mesh, batch, size), next(numbers)
    with Path(flags.FLAGS.workdir, f'rows.{process_group().index}').open('a' if number else 'w') as file:
      file.writelines(f'{number} {row} {digest}\n' for row, digest in digests(placed))
    return placed

  def digest_and_tell(path):
    group = process_group()
    with Path(flags.FLAGS.workdir, f'hashed-{group.count}.{group.index}').open('a') as file:
      print(path, path.stat().st_size, file=file)
    return digest(path)

  manifest._digest = digest_and_tell
  Checkpoints.save, loop.restore = keep_and_save, restore_and_keep
  batches.put_rows = place_and_tell
  return train.main(config)


def _keep(name: str, state) -> None:
  import jax
  parts = {}
  for path, leaf in jax.tree.leaves_with_path(state):
    for shard in leaf.addressable_shards:
      if shard.replica_id == 0:
        where = [index.indices(size)[:2] for index, size in zip(shard.index, leaf.shape)]
        parts[json.dumps([jax.tree_util.keystr(path), leaf.shape, where])] = np.asarray(shard.data)
  np.savez(Path(flags.FLAGS.workdir, f'{name}.{process_group().index}.npz'), **parts)


def kept(workdir: Path, name: str, processes: int) -> dict[str, np.ndarray]:
  """Joins the parts of the arrays that a number of processes kept under a name."""
  whole: dict[str, np.ndarray] = {}
  files = [np.load(workdir / f'{name}.{process}.npz') for process in range(processes)]
  for key, part in itertools.chain.from_iterable(file.items() for file in files):
    leaf, shape, where = json.loads(key)
    array = whole.setdefault(leaf, np.full(shape, 77, part.dtype))
    array[tuple(slice(*one) for one in where)] = part
  return whole


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
  """Whether two of these have the same arrays bit by bit."""
  return one.keys() == other.keys() and all(
    one[name].dtype == other[name].dtype and one[name].shape == other[name].shape and one[name].tobytes() == other[name].tobytes()
    for name in one)


if __name__ == '__main__':
  configs.run(main)
