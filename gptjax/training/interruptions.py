"""Requests to save or stop, from signals, the cloud and the clock, on which all processes act after the same step; and a watchdog."""

import contextlib
import enum
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.distributed import is_primary, process_group, watch_notices

REQUEUE_EXIT_CODE = os.EX_TEMPFAIL
"""75: the run was asked to stop and has saved; the same command resumes it."""
_GRACE = 60.0
"""Seconds after which a timer in C ends a hanging process in which not even the thread of the watchdog can run."""


class StopRequest(enum.IntEnum):
  """A request to act after a step; the largest of all processes wins."""

  NONE = 0
  SAVE = 1
  STOP = 2
  """save and end"""


class Interruptions:
  """Collects the requests. A context manager in which the first SIGTERM or SIGINT is a request, and the second ends the process.

  After `minutes` of wall-clock time since the last save (0: never) it requests another.
  """

  def __init__(self, mesh: Mesh, minutes: float = 0):
    self.reason = 'another process'
    """reason for stopping, to be printed"""
    self._seconds, self._saved, self._retry_at = 60 * minutes, time.monotonic(), float('inf')
    self._stop = False
    self._consensus = _Consensus(mesh) if jax.process_count() > 1 else None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> 'Interruptions':
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
    watch_notices(self._request_stop)
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _signalled(self, number: int, frame: object) -> None:
    for one in self._before:
      signal.signal(one, signal.SIG_DFL)
    self._request_stop(signal.Signals(number).name)
    with contextlib.suppress(OSError):  # the reader of stderr may have been ended by the same signal
      os.write(2, f'{self.reason}: saving after this step and ending; a second signal ends at once\n'.encode())

  def _request_stop(self, reason: str) -> None:
    self.reason, self._stop = reason, True

  def save_in(self, seconds: float) -> None:
    """Requests a save after some time, to retry one that failed."""
    self._retry_at = time.monotonic() + seconds

  def saved(self) -> None:
    """To be called when all processes save: earlier requests are then fulfilled."""
    self._saved, self._retry_at = time.monotonic(), float('inf')
    if self._consensus:
      self._consensus.reset()

  def poll(self) -> StopRequest:
    """Returns the request to act on now. All processes must call this after every step; with several it takes effect one step later."""
    now = time.monotonic()
    due = now >= self._retry_at or bool(is_primary() and self._seconds and now - self._saved >= self._seconds)
    mine = StopRequest.STOP if self._stop else StopRequest.SAVE if due else StopRequest.NONE
    return self._consensus(mine) if self._consensus else mine


class _Consensus:
  """The largest request of all processes, computed on the devices, so that it is in order with the steps and no process waits for it.

  The result that is dispatched after one step is read after the next, with the same value in every process.
  """

  def __init__(self, mesh: Mesh):
    self._count, self._sharding = mesh.size, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._largest = jax.jit(jnp.max)
    self._pending: jax.Array | None = None

  def __call__(self, request: StopRequest) -> StopRequest:
    mine = lambda index: np.full(len(range(*index[0].indices(self._count))), request, np.int32)
    requests = jax.make_array_from_callback((self._count,), self._sharding, mine)
    previous, self._pending = self._pending, self._largest(requests)
    return StopRequest.NONE if previous is None else StopRequest(int(previous))

  def reset(self) -> None:
    self._pending = None


class Watchdog:
  """Ends the process, with stacks-PROCESS.txt in a folder, if `progress` is not called for some seconds (0: never). A context manager."""

  def __init__(self, seconds: float, folder: Path):
    self._seconds, self._file = seconds, folder / f'stacks-{process_group().index}.txt'
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
        break
    else:
      return
    line = (f'hang: no step, batch or save was completed in {self._seconds:g} s, expected: one within --hang_timeout; the stacks of all '
            f'threads follow, and are in {self._file}')
    with contextlib.suppress(OSError), self._file.open('w') as file:  # a missing folder may be why it hangs
      faulthandler.dump_traceback(file)
    print(f'error: {line}', file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr)
    process_group().end(1, line)
