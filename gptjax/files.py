"""Atomic writes of files and folders, lines that survive a full disk, and strict JSON."""

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

from gptjax.config import UserError, operation


def expanded(path: Path | str, field: str = 'path') -> Path:
  """Expands ~ as a shell does: unlike pathlib, it leaves the home of an unknown user as it is. Raises a UserError for a URL."""
  if '://' in str(path):
    raise UserError(field, str(path), 'a path on this machine; only documents and token stores can be read from URLs')
  return Path(os.path.expanduser(path))


def writable(path: Path | str, field: str) -> Path:
  """Returns the expanded path of a file that long work is to write, or raises a UserError, before the work, if it cannot be written now."""
  path = expanded(path, field).absolute()
  if not path.parent.is_dir():
    raise UserError(field, str(path), f'a file in an existing folder; {path.parent} does not exist')
  partial = _partial(path)
  try:
    if path.is_dir():
      raise IsADirectoryError(0, 'this is a folder')
    partial.touch()
    partial.unlink(missing_ok=True)  # another process may check the same
  except OSError as error:
    raise UserError(field, str(path), f'a file that can be written ({error.strerror})') from None
  return path


def write_atomic(path: Path, text: str) -> None:
  """Writes a file of UTF-8 atomically."""
  with atomic_file(path) as partial:
    partial.write_text(text, encoding='utf-8')


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
  """Creates a file atomically: the body writes another one, which is then renamed, or removed after an error.

  Readers never see a part of it, even after a power failure.
  """
  partial = _partial(path)
  with operation('write', path):
    try:
      yield partial
      sync(partial)
      partial.rename(path)
    except BaseException:
      with contextlib.suppress(OSError):
        partial.unlink()
      raise
    sync(path.parent)


def save_figure(figure: Any, path: Path, **options: Any) -> None:
  """Writes a figure of matplotlib atomically, with options of its `savefig`; the format is that of the path's ending, or else PNG."""
  with atomic_file(path) as partial:
    figure.savefig(partial, format=path.suffix[1:] or 'png', **options)


def write_results(path: Path, text: str) -> None:
  """Writes the results of long work atomically. If that fails, for example on a full disk, they are printed on stdout instead."""
  try:
    write_atomic(path, text)
  except OSError:
    print(text, end='', flush=True)
    raise


def _partial(path: Path) -> Path:
  return path.with_name(f'{path.name}.partial')


class Lines:
  """Appends lines to a file. Lines that cannot be written, as on a full disk, are kept in memory and retried with the next."""

  def __init__(self, path: Path):
    self._path = path
    self.waiting = b''
    """lines that could not be written yet"""

  def write(self, line: str) -> str:
    """Writes a line; returns the error, '' for none."""
    self.waiting += line.encode()
    try:
      with self._path.open('ab', buffering=0) as file:
        while self.waiting:
          self.waiting = self.waiting[file.write(self.waiting):]
    except OSError as error:
      return error.strerror or str(error)
    return ''

  def flush(self) -> None:
    """Returns when all lines are on the disk; raises a UserError if they cannot be written, and stay in memory."""
    try:
      if error := self.write('') if self.waiting else '':
        raise UserError(str(self._path), error, 'a disk with space left')
      if self._path.exists():
        sync(self._path)
    except OSError as late:  # some file systems report a full disk only here
      raise UserError(str(self._path), late.strerror, 'a disk with space left') from None


def complete_lines(path: Path) -> list[str]:
  """The lines of a file, without an incomplete last one; none if the file does not exist."""
  if not path.exists():
    return []
  return [line for line in path.read_text(errors='replace').splitlines(keepends=True) if line.endswith('\n')]


def json_line(record: dict[str, Any]) -> str:
  """Returns one line of JSON; numbers that are not finite, which JSON lacks, become null."""
  def finite(value: Any) -> Any:
    if isinstance(value, dict):
      return {name: finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
      return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
  return json.dumps(finite(record))


def read_json(path: Path) -> dict[str, Any]:
  """Returns the object in a JSON file; raises a UserError if the file is missing or has other content."""
  try:
    return json_object(str(path), path.read_bytes())
  except FileNotFoundError:
    raise UserError(str(path), None, 'a JSON file; there is none') from None


def json_object(location: str, data: bytes | str) -> dict[str, Any]:
  """Parses a JSON object; raises a UserError that names `location` if the data is something else."""
  try:
    found = json.loads(data)
  except (ValueError, RecursionError) as error:  # not JSON, numbers too long for Python, or brackets too deep
    raise UserError(location, data[:40], f'JSON ({error})') from None
  if not isinstance(found, dict):
    raise UserError(location, data[:40], 'a JSON object')
  return found


def write_json(path: Path, values: Any) -> None:
  """Writes indented JSON atomically."""
  write_atomic(path, json.dumps(values, indent=2) + '\n')


@contextlib.contextmanager
def atomic_directory(directory: Path, worth_keeping: Callable[[Path], bool] = lambda folder: False,
             resumes: bool = True) -> Iterator[Path | None]:
  """Creates a folder atomically: the body fills the temporary folder that this yields (None if `directory` exists), which is then renamed.

  Other processes wait meanwhile. A process that is killed, or finds the disk full, leaves its files for the next to continue; after a
  UserError only files `worth_keeping` are left. If the body never `resumes`, it starts with an empty folder, which any error removes.
  """
  if directory.exists():
    yield None
    return
  with operation('create', directory), locked(directory.with_name(f'{directory.name}.lock')):
    if directory.exists():  # created by another process meanwhile
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
  """Removes a folder; threads of a failed save may continue for a moment and create it again."""
  for _ in range(100):
    shutil.rmtree(folder, ignore_errors=True)
    time.sleep(0.2)
    if not folder.exists():
      return
  shutil.rmtree(folder)  # raises the reason


def sync(path: Path) -> None:
  """Syncs a file, or the entries of a folder, to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds a lock file while the body runs, after waiting for its owner. The system releases the lock of a dead process."""
  path.parent.mkdir(parents=True, exist_ok=True)
  while True:
    file = path.open('w')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f'waiting for another process that prepares the same data ({path})', file=sys.stderr, flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    # The previous owner removes its file at the end: the lock is only valid on the file that exists now.
    with contextlib.suppress(FileNotFoundError):
      if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
        break
    file.close()
  try:
    yield
  finally:
    path.unlink(missing_ok=True)
    file.close()
