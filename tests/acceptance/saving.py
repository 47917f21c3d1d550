"""Measures what saving costs a run, in time and memory: python -m tests.acceptance.saving --config=... --workdir=DIR [--every=50 --saves=3]

Trains, and saves after every second stretch of --every steps: a stretch that begins with a save, and in whose background it is written,
is compared with the one before, in which nothing is saved; and, since a machine's speed drifts by more than a save costs, the steps
beside which it is written with the others around them. The last save is made while training stands still. With --saves=0 there is
one stretch, and no save but the last. Prints a JSON object.
"""

import gc
import json
import re
import statistics
import threading
import time
from pathlib import Path
from unittest import mock

from absl import flags

from gptjax import config as configs
from gptjax import train as command  # noqa: F401  (its flags)
from gptjax.config import Config
from gptjax.start import start

_EVERY = flags.DEFINE_integer('every', 50, 'steps of a stretch', lower_bound=1)
_SAVES = flags.DEFINE_integer('saves', 3, 'stretches with a save', lower_bound=0)


class Memory:
  """Samples what memory this process has; a context."""

  def __init__(self) -> None:
    self._over, self._most = threading.Event(), (0, 0)
    self._thread = threading.Thread(target=self._sample, daemon=True)

  def __enter__(self) -> 'Memory':
    self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._over.set()
    self._thread.join()

  def now(self) -> tuple[int, int]:
    """Bytes that are its own, and all that are resident: pages of files too."""
    status = Path('/proc/self/status').read_text()
    own, all_of_it = (re.search(rf'^{name}:\s+(\d+) kB', status, re.MULTILINE) for name in ('RssAnon', 'VmRSS'))
    assert own and all_of_it
    return 1024 * int(own[1]), 1024 * int(all_of_it[1])

  def most(self) -> tuple[int, int]:
    """The most since the last call."""
    found, self._most = self._most, self.now()
    return found

  def _sample(self) -> None:
    while not self._over.wait(0.005):
      own, all_of_it = self.now()
      self._most = max(self._most[0], own), max(self._most[1], all_of_it)


def main(config: Config) -> None:
  import jax
  from gptjax.training import Options, loop, train
  cache, workdir, every = start(config), Path(flags.FLAGS.workdir), _EVERY.value
  config = configs.override(config, {'checkpoint.every': 2 * every})
  last = max(2 * _SAVES.value + 1, 2) * every
  after, save = loop._Loop._after_step, loop._Loop._save
  ends: list[float] = []
  busy: set[int] = set()  # steps beside which something is saved
  peaks: list[tuple[int, int]] = []
  calls: list[float] = []
  found: dict = {}

  def at_the_end_of_a_step(self, last):
    step = self.steps.step
    self._read_pending()
    jax.block_until_ready(self.steps.state)
    ends.append(time.perf_counter())
    if self.checkpoints.saving:
      busy.update((step, step + 1))
    if step % every == 0:
      peaks.append(memory.most())
    return after(self, last)

  def timed_save(self, loss, waits):
    if waits:  # the last, beside which nothing goes on
      jax.block_until_ready(self.steps.state)
      self.checkpoints.wait()
      gc.collect()
      before = memory.now()
      memory.most()
    begun = time.perf_counter()
    save(self, loss, waits)
    seconds = time.perf_counter() - begun
    if waits:
      found.update(before=before, alone=memory.most(), whole_save=seconds, state=sum(x.nbytes for x in jax.tree.leaves(self.steps.state)))
    else:
      calls.append(seconds)
      busy.add(self.steps.step + 1)

  with Memory() as memory, mock.patch.object(loop._Loop, '_after_step', at_the_end_of_a_step), mock.patch.object(
      loop._Loop, '_save', timed_save):
    train(config, Options(workdir, cache, log_every=every, stop_at=last))
  # The first stretch compiles; then one without a save and one with it take turns.
  times = ends[every - 1::every]
  stretches = [{'seconds': b - a, 'memory': peak} for a, b, peak in zip(times, times[1:], peaks[1:])]
  lasted = {step: ends[step - 1] - ends[step - 2] for step in range(every + 1, last + 1)}
  more = []
  for begin in range(2 * every, last, 2 * every):
    usual = statistics.median(lasted[step] for step in range(begin - every // 2, begin + every) if step not in busy)
    more.append(sum(lasted[step] - usual for step in range(begin + 1, begin + every + 1) if step in busy))
  print(json.dumps({'without': stretches[0::2], 'with': stretches[1::2], 'more': more, 'calls': calls, **found}))


if __name__ == '__main__':
  configs.run(main)
