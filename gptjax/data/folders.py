"""Folders of finished files, local or in object storage: files, sizes, digests and byte ranges."""

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

Range = tuple[str, int, int]
"""File name, first byte, byte after the last."""

_MAX_RESIDENT = 2**29  # bytes of memory maps that may be resident before their pages are released
_FAULT_AROUND = 2**16  # bytes that Linux maps around a page fault
_CHUNK = 2**24  # bytes fetched and hashed at once


def open_folder(location: str) -> 'LocalFolder | RemoteFolder':
  """Opens the folder at a path, or at a URL such as s3://bucket/name."""
  return RemoteFolder(location) if '://' in location else LocalFolder(os.path.expanduser(location))


class LocalFolder:
  """A folder on this machine; byte ranges are views of memory maps."""

  def __init__(self, location: str):
    _raise_file_limit()
    self._root = Path(location)
    self._maps: dict[str, tuple[mmap.mmap, np.ndarray]] = {}
    self._touched = 0

  def read(self, name: str) -> bytes:
    """Contents of a file."""
    return (self._root / name).read_bytes()

  def sizes(self) -> dict[str, int]:
    """Bytes of each file."""
    return {path.name: path.stat().st_size for path in self._root.iterdir()}

  def local(self, name: str) -> Path:
    """A local path with the contents of the sub-folder `name`."""
    return self._root / name

  def copy(self, to: Path) -> None:
    """Copies the folder and everything below it."""
    shutil.copytree(self._root, to)

  def sha256(self, name: str) -> str:
    """Hex digest of a file."""
    with (self._root / name).open('rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()

  def ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
    """Reads byte ranges as uint8 arrays. Raises a UserError if a file cannot be read, or is too short."""
    found = []
    for name, start, stop in wanted:
      data = self.mapped(name)[start:stop]
      if len(data) < stop - start:
        raise damaged(f'{self._root}/{name}', f'{start + len(data):,} bytes', f'{stop:,} bytes or more,')
      found.append(data)
    self.count_touched(len(wanted), sum(stop - start for _, start, stop in wanted))
    return found

  def count_touched(self, ranges: int, size: int) -> None:
    """Counts ranges about to be read, `size` bytes in total, and releases the pages of all maps when too many are resident.

    Pages count as memory of this process until they are released (the page cache keeps them), and each fault maps its neighbours.
    """
    self._touched += ranges * _FAULT_AROUND + size
    if self._touched > _MAX_RESIDENT:
      self._touched = 0
      for mapped, _ in self._maps.values():
        mapped.madvise(mmap.MADV_DONTNEED)

  def mapped(self, name: str) -> np.ndarray:
    """A file as a memory-mapped uint8 array."""
    if name not in self._maps:
      try:
        with (self._root / name).open('rb') as file:
          mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
      except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(str(self._root / name), str(error), 'a readable file') from None
      self._maps[name] = mapped, np.frombuffer(mapped, np.uint8)
    return self._maps[name][1]


class RemoteFolder:
  """A folder in object storage, through fsspec; all ranges of one call are fetched concurrently."""

  def __init__(self, location: str):
    self._root = location.rstrip('/')
    self._errors = functools.partial(storage_errors, 'token store', self._root)

  @functools.cached_property
  def _system(self) -> Any:
    import fsspec
    with self._errors():
      return fsspec.core.url_to_fs(self._root)[0]

  def read(self, name: str) -> bytes:
    with self._errors():
      return self._system.cat_file(f'{self._root}/{name}')

  def sizes(self) -> dict[str, int]:
    with self._errors():
      return {info['name'].rpartition('/')[2]: info['size'] for info in self._system.ls(self._root, detail=True)}

  def local(self, name: str) -> Path:
    """Copies the sub-folder `name` to a temporary folder that exists as long as this object."""
    self._temporary = tempfile.TemporaryDirectory()
    RemoteFolder(f'{self._root}/{name}').copy(Path(self._temporary.name))
    return Path(self._temporary.name)

  def copy(self, to: Path) -> None:
    with self._errors():
      self._system.get(f'{self._root}/', f'{to}/', recursive=True)

  def sha256(self, name: str) -> str:
    digest = hashlib.sha256()
    with self._errors(), self._system.open(f'{self._root}/{name}', block_size=_CHUNK, cache_type='readahead') as file:
      while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()

  def ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
    paths = [f'{self._root}/{name}' for name, _, _ in wanted]
    with self._errors():
      found = self._system.cat_ranges(paths, [start for _, start, _ in wanted], [stop for _, _, stop in wanted], on_error='raise')
    for path, data, (_, start, stop) in zip(paths, found, wanted):
      if len(data) < stop - start:
        raise damaged(path, f'{start + len(data):,} bytes', f'{stop:,} bytes or more,')
    return [np.frombuffer(data, np.uint8) for data in found]


@functools.cache
def _raise_file_limit() -> None:
  """Raises this process's limit of open files to the maximum, because each mapped shard is one."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != hard:
    with contextlib.suppress(ValueError, OSError):  # some systems have a lower limit of their own
      resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def storage_errors(field: str, path: str) -> Iterator[None]:
  """Raises a UserError for an OSError and, if the path is a URL, for any error: storage clients raise those of many libraries."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    if '://' not in path and not isinstance(error, OSError):
      raise
    reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    raise UserError(field, path, f'a readable file, folder or URL ({reason})') from None


def damaged(file: str, found: object, expected: str) -> UserError:
  """The error for a file that is not as it was written."""
  return UserError(file, found, f'{expected} as written; restore it, or prepare the store again')
