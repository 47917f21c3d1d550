"""Writes which rows the devices of a run are given: python -m tools.feed --config=... --steps=200 --out=FILE

It feeds batches as training does and computes nothing. The file, FILE.I for process I where there are several, gets a line
`row digest` for each row on a device of this process: the row's number in the run, and the SHA-256 of its arrays. Runs of one config
agree on every row, regardless of the number of processes and devices, of the batches read ahead and of the batch size.
"""

from pathlib import Path

from absl import flags

from gptjax import config as configs
from gptjax.distributed import process_group
from gptjax.files import atomic_file
from gptjax.start import start
from .row_digests import digests

_OUT = flags.DEFINE_string('out', None, 'file to write', required=True)
_STEPS = flags.DEFINE_integer('steps', 200, 'steps to feed', lower_bound=1)
_FIRST = flags.DEFINE_integer('first_row', 0, 'rows taken before', lower_bound=0)


def main(config: configs.Config) -> None:
  cache = start(config)
  from gptjax.data import batches, prepare, train_rows
  from gptjax.sharding import make_mesh, process_rows, put_rows
  rows = train_rows(config, prepare(config.data, cache))
  mesh, size = make_mesh(config.mesh), config.batch_size
  feed = batches(rows, _FIRST.value, size, process_rows(mesh, size), prefetch=config.data.prefetch, workers=config.data.workers)
  group = process_group()
  out = Path(f'{_OUT.value}.{group.index}' if group.count > 1 else _OUT.value)
  with atomic_file(out) as partial, partial.open('w') as file:
    for step in range(_STEPS.value):
      batch = put_rows(mesh, next(feed), size)
      for row, digest in digests(batch):
        file.write(f'{_FIRST.value + step * size + row} {digest}\n')


if __name__ == '__main__':
  configs.run(main)
