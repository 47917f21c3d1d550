"""A run that hangs: after a stated time without progress every thread's stack is written, and the process ends."""

import faulthandler
import sys
import threading
import time
from pathlib import Path

from gptjax.distributed import process_group

_GRACE = 60.0
"""Seconds after which C code ends a process that cannot even run this module's thread."""


class Watchdog:
  """Ends the process when it is not told of progress for too long. A context.

  Args:
    seconds: without progress; 0: it sleeps.
    folder: stacks are written into it too, as stacks-PROCESS.txt.
  """

  def __init__(self, seconds: float, folder: Path):
    self._seconds = seconds
    self._file = folder / f'stacks-{process_group().index}.txt'
    self._heard = time.monotonic()
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
    """Tells that something was done."""
    self._heard = time.monotonic()

  def _watch(self) -> None:
    every = min(self._seconds / 4, 10.0)
    while not self._over.wait(every):
      # Should a C call keep the interpreter's lock for ever, this thread does not come back here, and the timer is not set anew.
      faulthandler.dump_traceback_later(self._seconds + _GRACE, exit=True)
      if time.monotonic() - self._heard > self._seconds:
        self._bite()

  def _bite(self) -> None:
    line = (f'hang: no step, batch or save was done for {self._seconds:g} s, expected: --hang_timeout above what they take; the stacks of '
            f'all threads follow, and are in {self._file}')
    try:
      with self._file.open('w') as file:
        faulthandler.dump_traceback(file)
    except OSError:  # a folder that vanished may be why it hangs
      pass
    print(f'error: {line}', file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr)
    process_group().end(1, line)
