"""Supervision: runs training as a child process, and restarts it after a crash as long as it makes progress."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PAUSES = (1, 4, 15, 60)
"""Seconds before each restart without progress in between; enough for outages of about a minute."""
_IDLE = len(_PAUSES) + 1
"""Ends in a row at the same checkpoint after which the command is not restarted."""


def supervise(command: Sequence[str], workdir: Path, restarts: int, final: Sequence[int]) -> int:
  """Runs a command, restarts it with a pause after a crash or a kill, and returns its last exit status.

  It is not restarted after `restarts`, if the last few starts led to no new checkpoint in the workdir, or after a `final` exit status.
  SIGTERM, SIGINT and SIGHUP are forwarded to the command; during a pause they end this function with os.EX_TEMPFAIL.
  """
  with _Signals() as signals:
    restart, idle, newest = 0, 0, _newest(workdir)
    while True:
      restart += 1
      status = signals.run(command)
      if status in final or signals.received:
        return status
      before, newest = newest, _newest(workdir)
      idle = 1 if newest != before else idle + 1
      words = f'the run ended with {_named(status)} ' + (
        'before its first checkpoint' if newest is None else f'after checkpoint {newest}')
      if idle == _IDLE or restart > restarts:
        _say(f'{words}, {_IDLE} times in a row: not restarted' if idle == _IDLE else f'{words}: not restarted, after {restarts} restarts')
        return status
      _say(f'{words}: restarted in {_PAUSES[idle - 1]} s, restart {restart} of {restarts}')
      if signals.wait(_PAUSES[idle - 1]):
        _say('ended by a signal: not restarted')
        return os.EX_TEMPFAIL


class _Signals:
  """Signals to this process, which are forwarded to the child, or end a pause."""

  def __init__(self) -> None:
    self.received = False
    self._pending: list[int] = []
    self._child: subprocess.Popen | None = None

  def __enter__(self) -> '_Signals':
    self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def run(self, command: Sequence[str]) -> int:
    """Returns the exit status of a command, as a shell reports it."""
    # Its own process group, so that signals from a terminal reach it only once, through this process.
    with subprocess.Popen(command, process_group=0) as child:
      self._child = child
      self._forward()  # signals that arrived while it started
      status = child.wait()
      self._child = None
    return status if status >= 0 else 128 - status

  def wait(self, seconds: float) -> bool:
    """Waits for some time or until a signal arrives; returns whether one has."""
    deadline = time.monotonic() + seconds
    while not self.received and (left := deadline - time.monotonic()) > 0:
      time.sleep(min(left, 0.2))  # a signal does not interrupt sleep
    return self.received

  def _handle(self, number: int, frame: object) -> None:
    self.received = True
    self._pending.append(number)
    self._forward()

  def _forward(self) -> None:
    while self._child and self._pending:
      self._child.send_signal(self._pending.pop())


def _newest(workdir: Path) -> int | None:
  with contextlib.suppress(OSError):
    return max((int(name) for name in os.listdir(workdir / 'checkpoints') if name.isdecimal()), default=None)
  return None


def _named(status: int) -> str:
  with contextlib.suppress(ValueError):
    return signal.Signals(status - 128).name
  return f'status {status}'


def _say(line: str) -> None:
  with contextlib.suppress(OSError):
    print(line, file=sys.stderr, flush=True)
