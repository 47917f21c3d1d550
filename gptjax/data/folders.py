"""Folders of finished files, here or in object storage: whole files, sizes, digests, and ranges of bytes."""

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

_RESIDENT = 2**29  # bytes of maps after which their pages are handed back
_NEIGHBOURS = 2**16  # bytes that Linux maps around a touched page
_CHUNK = 2**24  # bytes that are hashed, or asked for at once


def open_folder(place: str) -> 'LocalFolder | RemoteFolder':
  """The folder at a path, or at a URL such as s3://bucket/name."""
  return RemoteFolder(place) if '://' in place else LocalFolder(os.path.expanduser(place))


class LocalFolder:
  """A folder on this machine; ranges are views of memory maps."""

  def __init__(self, place: str):
    _many_files()
    self._root = Path(place)
    self._maps: dict[str, tuple[mmap.mmap, np.ndarray]] = {}
    self._read = 0

  def read(self, name: str) -> bytes:
    """A whole file."""
    return (self._root / name).read_bytes()

  def sizes(self) -> dict[str, int]:
    """Bytes of each file."""
    return {path.name: path.stat().st_size for path in self._root.iterdir()}

  def local(self, name: str) -> Path:
    """A path on this machine with the content of the sub-folder `name`."""
    return self._root / name

  def copy(self, to: Path) -> None:
    """Copies the whole folder."""
    shutil.copytree(self._root, to)

  def sha256(self, name: str) -> str:
    """Hex digest of a file."""
    with (self._root / name).open('rb') as file:
      return hashlib.file_digest(file, 'sha256').hexdigest()

  def ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
    """The bytes of each range, as uint8.

    Raises:
      UserError: a file cannot be read, or is shorter.
    """
    found = []
    for name, start, stop in wanted:
      data = self.mapped(name)[start:stop]
      if len(data) < stop - start:
        raise _too_short(self._root / name, start + len(data), stop)
      found.append(data)
    self.reading(len(wanted), sum(stop - start for _, start, stop in wanted))
    return found

  def reading(self, ranges: int, size: int) -> None:
    """To be told of ranges that are read, of so many bytes together.

    Pages count as memory of this process until it hands them back (the system keeps them cached), and each first touch
    brings its neighbours.
    """
    self._read += ranges * _NEIGHBOURS + size
    if self._read > _RESIDENT:
      self._read = 0
      for mapped, _ in self._maps.values():
        mapped.madvise(mmap.MADV_DONTNEED)

  def mapped(self, name: str) -> np.ndarray:
    """A whole file as uint8, nothing of it read yet."""
    return (self._maps.get(name) or self._map(name))[1]

  def _map(self, name: str) -> tuple[mmap.mmap, np.ndarray]:
    try:
      with (self._root / name).open('rb') as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
      raise UserError(str(self._root / name), str(error), 'a file that can be read') from None
    self._maps[name] = mapped, np.frombuffer(mapped, np.uint8)
    return self._maps[name]


class RemoteFolder:
  """A folder in object storage, through fsspec; the ranges of one call are asked for at once."""

  def __init__(self, place: str):
    self._root = place.rstrip('/')

  @functools.cached_property
  def _system(self) -> Any:
    import fsspec
    with remote_errors('token store', self._root):
      return fsspec.core.url_to_fs(self._root)[0]

  def read(self, name: str) -> bytes:
    with remote_errors('token store', self._root):
      return self._system.cat_file(f'{self._root}/{name}')

  def sizes(self) -> dict[str, int]:
    with remote_errors('token store', self._root):
      return {one['name'].rpartition('/')[2]: one['size'] for one in self._system.ls(self._root, detail=True)}

  def local(self, name: str) -> Path:
    """Copies the sub-folder `name` to a temporary place, which stays until the process ends."""
    copy = tempfile.TemporaryDirectory()
    _KEPT.append(copy)
    with remote_errors('token store', self._root):
      self._system.get(f'{self._root}/{name}/', f'{copy.name}/', recursive=True)
    return Path(copy.name)

  def copy(self, to: Path) -> None:
    with remote_errors('token store', self._root):
      self._system.get(f'{self._root}/', f'{to}/', recursive=True)

  def sha256(self, name: str) -> str:
    whole = hashlib.sha256()
    with remote_errors('token store', self._root), \
        self._system.open(f'{self._root}/{name}', block_size=_CHUNK, cache_type='readahead') as file:
      while chunk := file.read(_CHUNK):
        whole.update(chunk)
    return whole.hexdigest()

  def ranges(self, wanted: Sequence[Range]) -> list[np.ndarray]:
    paths = [f'{self._root}/{name}' for name, _, _ in wanted]
    with remote_errors('token store', self._root):
      found = self._system.cat_ranges(paths, [start for _, start, _ in wanted], [stop for _, _, stop in wanted], on_error='raise')
    for path, data, (_, start, stop) in zip(paths, found, wanted):
      if len(data) < stop - start:
        raise _too_short(path, start + len(data), stop)
    return [np.frombuffer(data, np.uint8) for data in found]


_KEPT: list[tempfile.TemporaryDirectory] = []


@functools.cache
def _many_files() -> None:
  """Lets this process have as many files open as it may: a map of a shard is one."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != hard:
    with contextlib.suppress(ValueError, OSError):  # some systems have a lower bound of their own
      resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def remote_errors(field: str, url: str) -> Iterator[None]:
  """Makes a UserError of what clients of object storage raise: errors of the system, and of the libraries below them."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    raise UserError(field, url, f'what can be read ({reason})') from None


def _too_short(file: object, length: int, wanted: int) -> UserError:
  return UserError(str(file), f'{length:,} bytes', f'{wanted:,} bytes or more, as it was written; restore it, or prepare the store again')
