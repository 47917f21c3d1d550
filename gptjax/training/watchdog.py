"""The watchdog ends a run that hangs: after some time without progress it writes the stacks of all threads and ends the process."""

import faulthandler
import sys
import threading
import time
from pathlib import Path

from gptjax.distributed import process_group

_GRACE = 60.0
"""Seconds after which a timer in C ends a process in which not even this thread can run."""


class Watchdog:
  """Ends the process, with stacks-PROCESS.txt in a folder, if `progress` is not called for some seconds (0: never). A context manager."""

  def __init__(self, seconds: float, folder: Path):
    self._seconds = seconds
    self._file = folder / f'stacks-{process_group().index}.txt'
    self._last_progress = time.monotonic()
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self) -> 'Watchdog':
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._over.set()
    if self._seconds:
      self._thread.join()
      faulthandler.cancel_dump_traceback_later()

  def progress(self, *_: object) -> None:
    """Reports progress."""
    self._last_progress = time.monotonic()

  def _watch(self) -> None:
    every = min(self._seconds / 4, 10.0)
    while not self._over.wait(every):
      # If a C call never releases the interpreter's lock, this thread cannot set the timer again, and it fires.
      faulthandler.dump_traceback_later(self._seconds + _GRACE, exit=True)
      if time.monotonic() - self._last_progress > self._seconds:
        self._end()

  def _end(self) -> None:
    line = (f'hang: no step, batch or save was completed in {self._seconds:g} s, expected: one within --hang_timeout; the stacks of all '
            f'threads follow, and are in {self._file}')
    try:
      with self._file.open('w') as file:
        faulthandler.dump_traceback(file)
    except OSError:  # a missing folder may be why it hangs
      pass
    print(f'error: {line}', file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr)
    process_group().end(1, line)
