"""Supervision: a run as a child process that is started again when it dies, for as long as it gets on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_PAUSES = (1, 4, 15, 60)
"""Seconds before the restarts that follow one another without progress; what is away for a minute is waited for."""
_IDLE = len(_PAUSES) + 1
"""Ends in a row at the same checkpoint, after which another start would end there too."""


def supervise(command: Sequence[str], workdir: Path, restarts: int, ended: Sequence[int]) -> int:
  """Runs a command until it ends by itself, and returns its exit status.

  SIGTERM, SIGINT and SIGHUP go on to the command. It is started again where it crashed or was killed, after a pause, but not more often
  than allowed, and not when its last starts led to no new checkpoint. Told to end during a pause, it returns os.EX_TEMPFAIL.

  Args:
    command: to run.
    workdir: of its run, by whose checkpoints progress is seen.
    restarts: most of them.
    ended: exit statuses with which it ended by itself, and another start would end alike.
  """
  with _Signals() as signals:
    idle, newest = 0, _newest(workdir)
    for restart in range(restarts + 1):
      status = signals.run(command)
      if status in ended or signals.told:
        return status
      before, newest = newest, _newest(workdir)
      idle = 1 if newest != before else idle + 1
      words = f'the run ended with {_named(status)} after checkpoint {newest}' if newest is not None else (
        f'the run ended with {_named(status)} before its first checkpoint')
      if idle == _IDLE:
        _say(f'{words}, {_IDLE} times in a row: not started again')
        return status
      if restart == restarts:
        _say(f'{words}: not started again, after {restarts} restarts')
        return status
      pause = _PAUSES[idle - 1]
      _say(f'{words}: started again in {pause} s, restart {restart + 1} of {restarts}')
      if signals.told_within(pause):
        return os.EX_TEMPFAIL
  raise AssertionError('the last turn returns')


class _Signals:
  """What asks this process to end: it goes on to the child, or ends a pause."""

  def __init__(self) -> None:
    self.told = False
    self._pending: list[int] = []
    self._child: subprocess.Popen | None = None

  def __enter__(self) -> '_Signals':
    self._before = {number: signal.signal(number, self._heed) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    return self

  def __exit__(self, *error: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def run(self, command: Sequence[str]) -> int:
    """The exit status of a command, as a shell tells it."""
    # A group of its own: what a terminal sends to ours reaches it once, through us.
    with subprocess.Popen(command, process_group=0) as child:
      self._child = child
      self._pass_on()  # what came while it started
      status = child.wait()
      self._child = None
    return status if status >= 0 else 128 - status

  def told_within(self, seconds: float) -> bool:
    """Waits for so long, or until this process is told to end."""
    deadline = time.monotonic() + seconds
    while not self.told and (left := deadline - time.monotonic()) > 0:
      time.sleep(min(left, 0.2))  # Python sleeps on after a signal
    return self.told

  def _heed(self, number: int, frame: object) -> None:
    del frame
    self.told = True
    self._pending.append(number)
    self._pass_on()

  def _pass_on(self) -> None:
    while self._child and self._pending:
      self._child.send_signal(self._pending.pop())


def _newest(workdir: Path) -> int | None:
  with contextlib.suppress(OSError):
    return max((int(name) for name in os.listdir(workdir / 'checkpoints') if name.isdecimal()), default=None)
  return None


def _named(status: int) -> str:
  if status > 128:
    with contextlib.suppress(ValueError):
      return signal.Signals(status - 128).name
  return f'status {status}'


def _say(line: str) -> None:
  with contextlib.suppress(OSError):
    print(line, file=sys.stderr, flush=True)
