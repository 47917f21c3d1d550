"""Folders of finished files, local or in object storage; errors of the libraries that read data."""

import contextlib
import functools
import hashlib
import mmap
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError

Range = tuple[str, int, int]  # file name, first byte, byte after the last
_MAX_RESIDENT = 2**29  # bytes of memory maps that may be resident before their pages are released
_FAULT_AROUND = 2**16  # bytes that Linux maps around a page fault
_CHUNK = 2**24  # bytes fetched at once


def open_folder(location: str) -> 'Folder':
  """Opens the folder at a path, or at a URL such as s3://bucket/name."""
  return Folder(location) if '://' in location else LocalFolder(os.path.expanduser(location))


class Folder:
  """A folder at a URL, through fsspec. Its methods raise a UserError if it cannot be read."""

  def __init__(self, location: str):
    self._root = location.rstrip('/')
    self._errors = functools.partial(storage_errors, 'token store', self._root,
                                     'a folder or URL of a token store made by tools.prepare_data')

  @functools.cached_property
  def _system(self) -> Any:
    with self._errors():
      return file_system(self._root)[0]

  def read(self, name: str) -> bytes:
    """Contents of a file."""
    with self._errors():
      return self._system.cat_file(f'{self._root}/{name}')

  def sizes(self) -> dict[str, int]:
    """Bytes of each file."""
    with self._errors():
      return {info['name'].rpartition('/')[2]: info['size'] for info in self._system.ls(self._root, detail=True)}

  def local(self, name: str) -> Path:
    """A local copy of the sub-folder `name`, which exists as long as this object."""
    self._temporary = tempfile.TemporaryDirectory()
    Folder(f'{self._root}/{name}').copy(Path(self._temporary.name))
    return Path(self._temporary.name)

  def copy(self, to: Path) -> None:
    """Copies the files, also those in sub-folders."""
    with self._errors():
      system, root = file_system(self._root)
      files = system.find(root)  # fsspec's own copy of a folder would read its name as a pattern
      system.get(files, [str(to / path[len(root):].lstrip('/')) for path in files])

  def sha256(self, name: str) -> str:
    """Hex digest of a file."""
    with self._errors(), self._system.open(f'{self._root}/{name}', block_size=_CHUNK, cache_type='readahead') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()

  def ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
    """Reads byte ranges as uint8 arrays, all concurrently. Raises a UserError if a file cannot be read, or is too short."""
    found = self._ranges(wanted)
    for data, (name, start, stop) in zip(found, wanted):
      if len(data) < stop - start:
        raise damaged(f'{self._root}/{name}', f'{start + len(data):,} bytes', f'{stop:,} bytes or more,')
    return found

  def _ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
    paths = [f'{self._root}/{name}' for name, _, _ in wanted]
    with self._errors():
      found = self._system.cat_ranges(paths, [start for _, start, _ in wanted], [stop for _, _, stop in wanted], on_error='raise')
    return [np.frombuffer(data, np.uint8) for data in found]


class LocalFolder(Folder):
  """A folder on this machine; byte ranges are views of memory maps."""

  def __init__(self, location: str):
    super().__init__(location)
    _raise_file_limit()
    self._maps: dict[str, tuple[mmap.mmap, np.ndarray]] = {}
    self._touched = 0

  def __reduce__(self):
    return LocalFolder, (self._root,)  # without memory maps

  @functools.cached_property
  def _system(self) -> Any:
    import fsspec  # takes 0.1 s to import
    return fsspec.filesystem('file')  # whatever is in the path

  def local(self, name: str) -> Path:
    return Path(self._root, name)

  def copy(self, to: Path) -> None:
    with self._errors():
      shutil.copytree(self._root, to, dirs_exist_ok=True)

  def _ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
    self.count_touched(len(wanted), sum(stop - start for _, start, stop in wanted))
    return [self.mapped(name)[start:stop] for name, start, stop in wanted]

  def count_touched(self, ranges: int, size: int) -> None:
    """Counts ranges about to be read, `size` bytes in total, and releases the pages of all maps when too many are resident."""
    self._touched += ranges * _FAULT_AROUND + size
    if self._touched > _MAX_RESIDENT:
      self._touched = 0
      for mapped, _ in self._maps.values():
        mapped.madvise(mmap.MADV_DONTNEED)

  def mapped(self, name: str) -> np.ndarray:
    """A file as a memory-mapped uint8 array."""
    if name not in self._maps:
      try:
        with Path(self._root, name).open('rb') as file:
          mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
      except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f'{self._root}/{name}', str(error), 'a readable file') from None
      self._maps[name] = mapped, np.frombuffer(mapped, np.uint8)
    return self._maps[name][1]


@functools.cache
def _raise_file_limit() -> None:
  """Raises this process's limit of open files to the maximum, because each mapped shard is one."""
  _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  with contextlib.suppress(ValueError, OSError):  # some systems have a lower limit of their own
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def file_system(path: str) -> tuple[Any, str]:
  """The fsspec file system of a path or URL, and the path within it."""
  import fsspec  # takes 0.1 s to import
  return fsspec.core.url_to_fs(path)


@contextlib.contextmanager
def library_errors(field: str, value: object, expected: str = '', errors: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
  """Raises a UserError for errors of a library, with the first line of their message, and for a package that is not installed."""
  try:
    yield
  except UserError:
    raise
  except ImportError as error:
    package = getattr(error.__cause__, 'name', None) or error.name  # fsspec's own error does not have the name
    raise UserError(field, value, f'a machine with the {package} package: pip install {package}') from None
  except errors as error:
    reason = getattr(error, 'strerror', None) or f'{type(error).__name__}: {error}'.strip().splitlines()[0]
    raise UserError(field, value, f'{expected} ({reason})') from None


def storage_errors(field: str, path: str, expected: str = 'a readable file, folder or URL') -> contextlib.AbstractContextManager[None]:
  """Raises a UserError for an OSError and, if the path is a URL, for any error: storage clients raise those of many libraries."""
  return library_errors(field, path, expected, (Exception if '://' in path else OSError,))


def damaged(file: str, found: object, expected: str) -> UserError:
  """The error for a file that is not as it was written."""
  return UserError(file, found, f'{expected} as written; restore it, or prepare the store again')
