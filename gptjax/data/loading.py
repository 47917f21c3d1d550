"""Loading: batches prepared ahead of the step that reads them, in a thread or in processes, through Grain."""

import contextlib
import signal
import threading
from collections.abc import Generator

import numpy as np

from gptjax.data.encoding import end_with_parent
from gptjax.data.rows import Batch, TrainRows


def _start_worker(_index: int, _count: int) -> None:
  for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and Slurm also send them to workers, which the run needs to end cleanly
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=end_with_parent, daemon=True).start()


def batches(rows: TrainRows, first_row: int, batch_size: int, local_rows: np.ndarray, *, prefetch: int,
            workers: int) -> Generator[Batch, None, None]:
  """Yields the batches of a run without end; the generator must be closed to end its threads and processes.

  Args:
    rows: of the run.
    first_row: rows taken before.
    batch_size: B, rows per step over all processes.
    local_rows: [n] which rows of each batch this process makes, from 0 to B - 1.
    prefetch: batches prepared ahead; 0: each is prepared on request.
    workers: processes that prepare them; 0: a thread.
  """
  import grain  # imports JAX, which takes seconds and which tools do not need
  # Elements are batches and not rows, because with rows Grain was 20 times slower (64 x 1,024 tokens: 6 against 137 million tokens/s
  # on 2 cores). A dataset must have a length.
  dataset = grain.MapDataset.range(2**62).map(lambda step: rows.batch(first_row + step * batch_size + local_rows))
  if workers:
    from absl import flags
    flags.FLAGS.mark_as_parsed()  # Grain passes flags to its workers, and requires that they are parsed
    each = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-prefetch // workers))
    iterator = iter(each.mp_prefetch(options, worker_init_fn=_start_worker))
  else:
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)))
  try:
    yield from iterator
  finally:
    with contextlib.suppress(AttributeError):  # raised by Grain if a worker failed before all had started
      iterator.close()
