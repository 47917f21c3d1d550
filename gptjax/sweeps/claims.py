"""Claims: which worker runs a trial, as files on a disk that all workers share. No server, no clock that they agree on.

The claim with the highest number counts. Only one worker can create the next one, so a claim is taken over once. Its owner touches it at
every beat; a worker that sees it untouched for one and a half beats, by its own clock, takes it for that of a dead one.
"""

import os
import re
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
    os.utime(_path(self._folder, self._number))
    return max(_numbers(self._folder)) == self._number

  def release(self) -> None:
    """Lets others claim the trial, unless one has done so. The file stays, empty, since a number that was used again could be that of two
    owners."""
    os.truncate(_path(self._folder, self._number), 0)


class Claims:
  """Claims trials for the workers of this process, and watches those of others; `beat`: seconds."""

  def __init__(self, beat: float):
    self.beat = beat
    self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
    self._lock = threading.Lock()

  def take(self, folder: Path) -> Claim | None:
    """Claims the trial in a folder; None if another worker has it."""
    with self._lock:
      number = max(_numbers(folder), default=0)
      if number and not self._is_free(folder, number):
        return None
    mine = folder / f'claimed.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}'
    mine.write_text(f'process {os.getpid()} on {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}, beat {self.beat:g} s\n')
    try:
      os.link(mine, _path(folder, number + 1))  # unlike a rename, fails if another worker was faster; its text is complete
    except FileExistsError:
      return None
    finally:
      mine.unlink()
    return Claim(folder, number + 1)

  def _is_free(self, folder: Path, number: int) -> bool:
    """Whether a claim was released, or has not changed for so long, by the beat of its owner, that this is dead."""
    path = _path(folder, number)
    found, known = path.stat(), self._seen.get(folder)
    if not found.st_size:
      return True
    if known is None or known[0] != (number, found.st_mtime_ns):
      self._seen[folder] = (number, found.st_mtime_ns), time.monotonic()
      return False
    beat = re.search(r'beat (\S+) s', path.read_text())
    return beat is not None and time.monotonic() - known[1] >= STALE * float(beat[1])


def is_claimed(folder: Path) -> bool:
  """Whether some worker, dead or alive, claims a trial."""
  number = max(_numbers(folder), default=0)
  return number > 0 and _path(folder, number).stat().st_size > 0


def _path(folder: Path, number: int) -> Path:
  return folder / f'claim.{number}'


def _numbers(folder: Path) -> list[int]:
  return [int(name[6:]) for name in os.listdir(folder) if name.startswith('claim.') and name[6:].isdecimal()]
