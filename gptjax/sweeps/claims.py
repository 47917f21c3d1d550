"""Claims: which worker runs a trial, as files on a disk that all workers share. No server, no clock that they agree on.

The claim with the highest number counts. Only one worker can create the next one, so a claim is taken over once. Its owner touches it at
every beat; a worker that sees it untouched for one and a half beats, by its own clock, takes it for that of a dead one.
"""

import os
import socket
import threading
import time
from pathlib import Path

STALE = 1.5
"""Beats without a sign of life after which a claim is taken over; owners beat four times as often as they must."""


class Claim:
  """A claim of this process."""

  def __init__(self, folder: Path, number: int):
    self._folder, self._number = folder, number

  def beat(self) -> bool:
    """Shows that its owner lives; returns whether it still counts: an owner that slept may have lost it."""
    try:
      os.utime(_path(self._folder, self._number))
    except FileNotFoundError:
      return False
    return max(_numbers(self._folder), default=0) == self._number

  def release(self) -> None:
    """Lets others claim the trial, unless one has done so."""
    for number in _numbers(self._folder):
      if number <= self._number:
        _path(self._folder, number).unlink(missing_ok=True)


class Claims:
  """Claims trials for the workers of this process, and watches those of others; `beat`: seconds."""

  def __init__(self, beat: float):
    self.beat = beat
    self._seen: dict[Path, tuple[tuple[int, int, int], float]] = {}
    self._lock = threading.Lock()

  def take(self, folder: Path) -> Claim | None:
    """Claims the trial in a folder; None if another worker has it."""
    with self._lock:
      number = max(_numbers(folder), default=0)
      if number and not self._is_stale(folder, number):
        return None
    try:
      descriptor = os.open(_path(folder, number + 1), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
      return None
    with os.fdopen(descriptor, 'w') as file:
      file.write(f'process {os.getpid()} on {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
    return Claim(folder, number + 1)

  def _is_stale(self, folder: Path, number: int) -> bool:
    """Whether a claim has not changed for so long that its owner is dead."""
    try:
      found = _path(folder, number).stat()
    except FileNotFoundError:  # released at this moment
      return False
    print_of = number, found.st_mtime_ns, found.st_ino
    known = self._seen.get(folder)
    if known is None or known[0] != print_of:
      self._seen[folder] = print_of, time.monotonic()
      return False
    return time.monotonic() - known[1] >= STALE * self.beat


def is_claimed(folder: Path) -> bool:
  """Whether some worker, dead or alive, claims a trial."""
  return bool(_numbers(folder))


def _path(folder: Path, number: int) -> Path:
  return folder / f'claim.{number}'


def _numbers(folder: Path) -> list[int]:
  return [int(name[6:]) for name in os.listdir(folder) if name.startswith('claim.') and name[6:].isdecimal()]
