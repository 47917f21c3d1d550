"""Requests to save or stop, from signals, the cloud and the clock; all processes of a run act on them after the same step."""

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
"""75: the run was asked to stop and has saved; the same command resumes it."""


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
    del frame
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
  """The largest request of all processes, computed on the devices, so that it is in order with the steps and nobody waits for it.

  The result that is dispatched after one step is read after the next, with the same value in every process.
  """

  def __init__(self, mesh: Mesh):
    self._count, self._sharding = mesh.size, NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._largest = jax.jit(jnp.max)
    self._pending: jax.Array | None = None

  def __call__(self, request: StopRequest) -> StopRequest:
    mine = lambda index: np.full(len(range(*index[0].indices(self._count))), request, np.int32)
    wishes = jax.make_array_from_callback((self._count,), self._sharding, mine)
    previous, self._pending = self._pending, self._largest(wishes)
    return StopRequest.NONE if previous is None else StopRequest(int(previous))

  def reset(self) -> None:
    self._pending = None
