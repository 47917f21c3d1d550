"""Loading: batches made ahead of the step that reads them, by a thread or by processes, through Grain."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Generator

import numpy as np

from gptjax.data.encoding import end_with_parent
from gptjax.data.rows import Batch, TrainRows

_STEPS = 2**62  # as good as endless; Grain asks for a length


@dataclasses.dataclass(frozen=True, eq=False)
class _Batches:
  """Grain's view of a run: element i is the batch of step i.

  A whole batch is one element: with rows as elements, 64 of 1,024 tokens a batch, it was 20 times slower (6 against 137
  million tokens a second on 2 cores).
  """

  rows: TrainRows
  first_row: int
  batch_size: int
  mine: np.ndarray

  def __len__(self) -> int:
    return _STEPS

  def __getitem__(self, index: int) -> Batch:
    return self.rows.batch(self.first_row + index * self.batch_size + self.mine)


def _start_worker(index: int, count: int) -> None:
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and Slurm tell them to workers too, which the run needs to end well
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=end_with_parent, daemon=True).start()


def batches(rows: TrainRows, first_row: int, batch_size: int, mine: np.ndarray, *, prefetch: int,
            workers: int) -> Generator[Batch, None, None]:
  """The batches of a run from some row on, without end; to be closed, so that its threads and processes end.

  Args:
    rows: of the run.
    first_row: rows taken before.
    batch_size: B, rows a step takes, over all processes.
    mine: [n] which rows of each batch this process makes, from 0 to B - 1.
    prefetch: batches made ahead; 0: none, each is made when it is asked for.
    workers: processes that make them; 0: a thread.
  """
  import grain  # brings JAX, which takes seconds and tools do without
  dataset = grain.MapDataset.source(_Batches(rows, first_row, batch_size, mine))
  read = grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)
  ready = dataset.to_iter_dataset(read)
  if workers:
    from absl import flags
    flags.FLAGS.mark_as_parsed()  # Grain hands the flags of a process on to its workers, and asks whether there are any
    alone = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    ready = alone.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-prefetch // workers)),
                              worker_init_fn=_start_worker)
  iterator = iter(ready)
  try:
    yield from iterator
  finally:
    with contextlib.suppress(AttributeError):  # Grain's own, where a worker failed before all had started
      iterator.close()
