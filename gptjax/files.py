"""Files that are whole or not there, and JSON that every reader understands."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config import UserError


def expanded(path: Path | str) -> Path:
  """The path with ~ as a shell reads it: that of a user whom nobody knows stays as it is (and pathlib raises)."""
  return Path(os.path.expanduser(path))


def write_atomic(path: Path, text: str) -> None:
  """Writes a file beside its place and then moves it there: who reads it never sees a part, even after a power cut."""
  partial = path.with_name(f'{path.name}.partial')
  partial.write_text(text)
  sync(partial)
  partial.rename(path)
  sync(path.parent)


class Lines:
  """Appends to a file of lines. Those that find no space, or no folder, wait in memory for the next."""

  def __init__(self, path: Path):
    self._path, self._waiting = path, b''

  @property
  def waiting(self) -> bool:
    """Whether a line waits."""
    return bool(self._waiting)

  def write(self, line: str) -> str:
    """Writes a line; returns what kept it from the disk."""
    self._waiting += line.encode()
    try:
      with self._path.open('ab', buffering=0) as file:
        while self._waiting:
          self._waiting = self._waiting[file.write(self._waiting):]
    except OSError as error:
      return error.strerror or str(error)
    return ''

  def flush(self) -> None:
    """Returns when all lines are on the disk.

    Raises:
      UserError: something keeps them from it.
    """
    try:
      if error := self.write('') if self._waiting else '':
        raise UserError(str(self._path), error, 'a disk with space left')
      if self._path.exists():
        sync(self._path)
    except OSError as late:  # some file systems say only here that there is no space
      raise UserError(str(self._path), late.strerror, 'a disk with space left') from None


def complete_lines(path: Path) -> list[str]:
  """The lines of a file, where there is one, without a last one that was never finished."""
  if not path.exists():
    return []
  return [line for line in path.read_text(errors='replace').splitlines(keepends=True) if line.endswith('\n')]


def json_line(record: dict[str, Any]) -> str:
  """One line of JSON; numbers that are not finite, which JSON does not have, become null."""
  def finite(value: Any) -> Any:
    if isinstance(value, dict):
      return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
      return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
  return json.dumps(finite(record))


def read_json(path: Path) -> Any:
  """The JSON of a file.

  Raises:
    UserError: there is no such file, or something else is in it.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(str(path), None, 'a JSON file; there is none') from None
  except (ValueError, RecursionError) as error:  # the latter of brackets within brackets
    raise UserError(str(path), str(error), 'a whole JSON file') from None


def write_json(path: Path, values: Any) -> None:
  """Writes JSON for people to read, whole or not at all."""
  write_atomic(path, json.dumps(values, indent=2) + '\n')


@contextlib.contextmanager
def atomic_directory(directory: Path, worth_keeping: Callable[[Path], bool] = lambda folder: False,
             resumes: bool = True) -> Iterator[Path | None]:
  """A folder that appears whole or not at all: the body fills another beside it, which then takes its place.

  Yields the folder to fill, or None where `directory` is there already. One process at a time; others wait. A killed
  process, or one that found the disk full, leaves what it had to be found there by the next; a body that raises a UserError
  leaves nothing, unless it is `worth_keeping`. Where the body cannot go on with what another began, `resumes` is False: it
  finds an empty folder, and whatever it raises leaves nothing.
  """
  if directory.exists():
    yield None
    return
  directory.parent.mkdir(parents=True, exist_ok=True)
  with locked(directory.with_name(f'{directory.name}.lock')):
    if directory.exists():  # another process was faster
      yield None
      return
    folder = directory.with_name(f'{directory.name}.building')
    if not resumes:
      shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    try:
      yield folder
    except BaseException as error:
      if not resumes or (isinstance(error, UserError) and not worth_keeping(folder)):
        _remove(folder)
      raise
    sync(folder)
    folder.rename(directory)
    sync(directory.parent)


def _remove(folder: Path) -> None:
  """Removes a folder for good: threads of a save that failed go on for a moment, and would make it anew."""
  for _ in range(100):
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.2)
    if not folder.exists():
      return
  shutil.rmtree(folder)  # tells what keeps it


def sync(path: Path) -> None:
  """Waits until a file, or the list of a folder's files, is on the disk and not only on its way there."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds a lock file while the body runs; waits for whoever has it. The system frees the lock of a killed process."""
  path.parent.mkdir(parents=True, exist_ok=True)
  while True:
    file = path.open('w')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'waiting for another process that prepares the same ({path})', file=sys.stderr, flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    # Whoever had it removed its file at the end: a lock counts only on the file that is there now.
    with contextlib.suppress(FileNotFoundError):
      if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
        break
    file.close()
  try:
    yield
  finally:
    path.unlink(missing_ok=True)
    file.close()
