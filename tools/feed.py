"""Tells which rows the devices of a run are given: python -m tools.feed --config=... --steps=200 --out=FILE

It feeds as training does and computes nothing. The file, FILE.I of process I where there are several, gets
a line `row digest` for each row of a device of this process: its number in the run and the SHA-256 of all that the model gets
of it. Runs of one config agree on every row, however many processes, devices, batches ahead, and rows a step they have.
"""

import hashlib
from pathlib import Path

import numpy as np
from absl import flags

from gptjax import config as configs
from gptjax.processes import company
from gptjax.start import start

_OUT = flags.DEFINE_string('out', None, 'file to write', required=True)
_STEPS = flags.DEFINE_integer('steps', 200, 'steps to feed', lower_bound=1)
_FIRST = flags.DEFINE_integer('first_row', 0, 'rows taken before', lower_bound=0)


def main(config: configs.Config) -> None:
  cache = start(config)
  from gptjax.data import batches, prepare, train_rows
  from gptjax.sharding import make_mesh, my_rows, place_rows
  rows = train_rows(config, prepare(config.data, cache))
  mesh, size = make_mesh(config.mesh), config.batch_size
  feed = batches(rows, _FIRST.value, size, my_rows(mesh, size), prefetch=config.data.prefetch, workers=config.data.workers)
  group = company().group
  out = Path(f'{_OUT.value}.{group.process}' if group.processes > 1 else _OUT.value)
  with out.open('w') as file:
    for step in range(_STEPS.value):
      batch = place_rows(mesh, next(feed), size)
      for row, digest in digests(batch):
        file.write(f'{_FIRST.value + step * size + row} {digest}\n')


def digests(batch: dict) -> list[tuple[int, str]]:
  """The digest of each row of a batch that a device of this process has, by its place in the batch."""
  found: dict[int, hashlib._Hash] = {}
  for name in sorted(batch):
    for shard in batch[name].addressable_shards:
      if shard.replica_id == 0:
        first = shard.index[0].start or 0
        for row, values in enumerate(np.asarray(shard.data), first):
          found.setdefault(row, hashlib.sha256()).update(name.encode() + values.tobytes())
  return [(row, digest.hexdigest()) for row, digest in sorted(found.items())]


if __name__ == '__main__':
  configs.run(main)
