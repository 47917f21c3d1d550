"""Supervision: a run as a child process that is started again when it dies, for as long as it gets on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds before the first restart; twice as many before each further one without progress."""
_IDLE = 3
"""Ends in a row at the same checkpoint, after which another start would end there too."""


def supervise(command: Sequence[str], workdir: Path, restarts: int, ended: Sequence[int]) -> int:
  """Runs a command until it ends by itself, and returns its exit status.

  SIGTERM, SIGINT and SIGHUP go on to the command. It is started again where it crashed or was killed, after a pause, but not more often
  than allowed, and not when its last starts led to no new checkpoint.

  Args:
    command: to run.
    workdir: of its run, by whose checkpoints progress is seen.
    restarts: most of them.
    ended: exit statuses with which it ended by itself, and another start would end alike.
  """
  idle, newest = 0, _newest(workdir)
  for restart in range(restarts + 1):
    status, interrupted = _run(command)
    if status in ended or interrupted:
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
    pause = min(_FIRST_PAUSE * 2**(idle - 1), _LONGEST_PAUSE)
    _say(f'{words}: started again in {pause:g} s, restart {restart + 1} of {restarts}')
    time.sleep(pause)
  raise AssertionError('the last turn returns')


def _run(command: Sequence[str]) -> tuple[int, bool]:
  """Exit status, as a shell tells it, and whether it was asked to end."""
  # A group of its own: what a terminal sends to ours reaches it once, through us.
  with subprocess.Popen(command, process_group=0) as child, _passing_on(child) as signals:
    status = child.wait()
  return (status if status >= 0 else 128 - status), bool(signals)


@contextlib.contextmanager
def _passing_on(child: subprocess.Popen) -> Iterator[list[int]]:
  signals: list[int] = []

  def pass_on(number: int, frame: object) -> None:
    del frame
    signals.append(number)
    child.send_signal(number)

  before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
  try:
    yield signals
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


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
