"""What asks a run to save, or to save and end, before its time; and how all its processes come to do it after the same step."""

import contextlib
import enum
import os
import signal
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.distributed import is_primary, watch_notices

REQUEUE_EXIT_CODE = os.EX_TEMPFAIL
"""Exit status, 75, of a run that was asked to end, and saved: the same command goes on."""


class StopRequest(enum.IntEnum):
  """What a process would do after a step."""

  NONE = 0
  SAVE = 1
  STOP = 2
  """save, and end"""


class Interruptions:
  """Hears SIGTERM, SIGINT, the cloud and the clock. A context; inside it the first signal is a request and the second ends at once.

  Args:
    mesh: of the run.
    minutes: of the clock between two saves; 0: none for that.
  """

  def __init__(self, mesh: Mesh, minutes: float = 0):
    self.reason = 'another process'
    """why this process ends, for people"""
    self._seconds, self._saved, self._later = 60 * minutes, time.monotonic(), float('inf')
    self._end = False
    self._agree = _Consensus(mesh) if jax.process_count() > 1 else None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> 'Interruptions':
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
    watch_notices(self._asked)
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _signalled(self, number: int, frame: object) -> None:
    del frame
    for one in self._before:
      signal.signal(one, signal.SIG_DFL)
    self._asked(signal.Signals(number).name)
    with contextlib.suppress(OSError):  # whoever reads stderr may have got the same signal
      os.write(2, f'{self.reason}: saving after this step and ending; once more ends at once\n'.encode())

  def _asked(self, reason: str) -> None:
    self.reason, self._end = reason, True

  def save_in(self, seconds: float) -> None:
    """Wishes for a save when so much time is over, as after one that failed."""
    self._later = time.monotonic() + seconds

  def saved(self) -> None:
    """Every process saves: nobody waits for that any more."""
    self._saved, self._later = time.monotonic(), float('inf')
    if self._agree:
      self._agree.forget()

  def poll(self) -> StopRequest:
    """What all processes do now; to be asked by each, once after each step. Several agree one step later than one alone."""
    now = time.monotonic()
    due = now >= self._later or bool(is_primary() and self._seconds and now - self._saved >= self._seconds)
    mine = StopRequest.STOP if self._end else StopRequest.SAVE if due else StopRequest.NONE
    return self._agree(mine) if self._agree else mine


class _Consensus:
  """The largest request of all processes, computed by the devices beside the step, so that nobody waits for it.

  What is dispatched after one step is read after the next, when every process has the same value of it.
  """

  def __init__(self, mesh: Mesh):
    self._count, self._sharding = mesh.size, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._largest = jax.jit(jnp.max)
    self._waiting: jax.Array | None = None

  def __call__(self, request: StopRequest) -> StopRequest:
    mine = lambda index: np.full(len(range(*index[0].indices(self._count))), request, np.int32)
    wishes = jax.make_array_from_callback((self._count,), self._sharding, mine)
    before, self._waiting = self._waiting, self._largest(wishes)
    return StopRequest.NONE if before is None else StopRequest(int(before))

  def forget(self) -> None:
    self._waiting = None
