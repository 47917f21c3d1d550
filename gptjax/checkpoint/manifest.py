"""The manifest of a checkpoint: its metadata and the XXH3 checksum of every file. It is written last, and verified before use.

Each process writes a part with the checksums of its own arrays, and process 0 joins these, so that no process reads the files of another.

128 bits detect the damage that disks and networks do, at the speed of memory. Large files are hashed while they are written, and then
dropped from the system's page cache: on virtual machines whose host reclaims unused memory, allocating it is most of the cost of a save.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_128 as Digest

from gptjax.data import cores
from gptjax.files import read_json, sync, write_json

MANIFEST = 'manifest.json'
_PART = 'manifest.{}.part'
"""Name of the part of the process with this index, while a checkpoint is being written."""
_PATIENCE = 300.0
"""Seconds that process 0 waits for the parts of others, which are written at the same time as its own."""
_PAUSE = 0.01
"""Seconds between two scans of the files, in which a few _CHUNK_BYTES are written."""
_CHUNK_BYTES = 2**20
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Damaged(Exception):
  """A checkpoint differs from what was written; the text names the file and the difference."""


def write_part(folder: Path, process: int, known: Mapping[int, tuple[int, str]]) -> None:
  """Writes a process's part of the manifest: its files of arrays. `known`: inode -> (size, XXH3) of those that need not be read again."""
  write_json(folder / _PART.format(process), _entries(folder, folder.glob(f'*/ocdbt.process_{process}/**/*'), known))


def write_manifest(folder: Path, facts: dict[str, Any], processes: int = 0) -> None:
  """Joins the parts of all processes with the checksums of the other files, and syncs the folder to disk.

  Raises a TimeoutError if a part is missing, since its process failed.
  """
  parts = [_wait_for(folder / _PART.format(process)) for process in range(processes)]
  found = {name: entry for part in parts for name, entry in read_json(part).items()}
  for part in parts:
    part.unlink()
  found |= _entries(folder, (path for path in folder.rglob('*') if str(path.relative_to(folder)) not in found))
  content = {'facts': facts, 'files': dict(sorted(found.items()))}
  (folder / MANIFEST).write_text(json.dumps({'xxh3': _self_digest(content), **content}, indent=1) + '\n')
  for path in (*folder.rglob('*'), folder):
    sync(path)


def _wait_for(path: Path) -> Path:
  deadline = time.monotonic() + _PATIENCE
  while not path.exists():
    if time.monotonic() > deadline:
      raise TimeoutError(f'{path} is missing')
    time.sleep(_PAUSE)
  return path


def read_manifest(folder: Path) -> dict[str, Any]:
  """The 'facts' and 'files' of a manifest; raises Damaged if it is missing or damaged itself, and an OSError if it cannot be read now."""
  try:
    with _naming(folder / MANIFEST):
      manifest = json.loads((folder / MANIFEST).read_bytes())
    content = {'facts': manifest['facts'], 'files': manifest['files']}
    intact = manifest['xxh3'] == _self_digest(content)
  except _MISSING:
    raise Damaged(f'{MANIFEST} is missing') from None
  except (ValueError, LookupError, TypeError, RecursionError):
    intact = False
  if not intact:
    raise Damaged(f'{MANIFEST} is damaged')
  return content


def verify(folder: Path, unread: Collection[str] = (), part: int = 0, parts: int = 1) -> str:
  """The first damage found in a part of a checkpoint's files, '' if there is none; raises an OSError if a file cannot be read now.

  Files below the folders `unread` are left out.
  """
  try:
    files = read_manifest(folder)['files']
  except Damaged as damaged:
    return str(damaged)
  mine = [(name, entry) for name, entry in files.items() if name.partition('/')[0] not in unread][part::parts]
  with ThreadPoolExecutor(cores()) as pool:
    return next(filter(None, pool.map(lambda item: _difference(folder, item[0], *item[1]), mine)), '')


def _difference(folder: Path, name: str, size: int, digest: str) -> str:
  path = folder / name
  try:
    with _naming(path):
      found = path.stat().st_size
      if found != size:
        return f'{name} has {found:,} bytes, not {size:,}'
      return '' if _digest(path) == digest else f'{name} has another XXH3 checksum than when it was written'
  except _MISSING:
    return f'{name} is missing'


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
  """Adds the file's name to an OSError, which errors in reading lack."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error  # OSError() returns the subclass for the number


def _entries(folder: Path, paths: Iterable[Path], known: Mapping[int, tuple[int, str]] = {}) -> dict[str, tuple[int, str]]:
  """Returns (size, XXH3) of the files among paths, by their names in a folder."""
  def entry(path: Path) -> tuple[int, str]:
    status = path.stat()
    size, digest = known.get(status.st_ino, (-1, ''))
    return (size, digest) if size == status.st_size else (status.st_size, _digest(path))

  files = sorted(path for path in paths if path.is_file())
  # At most half of the cores, since training continues.
  with ThreadPoolExecutor(max(1, cores() // 2)) as pool:
    return dict(zip((str(path.relative_to(folder)) for path in files), pool.map(entry, files)))


def _digest(path: Path) -> str:
  with path.open('rb', buffering=0) as file:
    return hashlib.file_digest(file, Digest).hexdigest()


def _self_digest(content: dict[str, Any]) -> str:
  return Digest(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def streaming_checksums(saving: Path, process: int) -> Iterator[dict[int, tuple[int, str]]]:
  """Hashes the files that this process writes while the body runs; yields a dict that then maps inode -> (size, digest) of what was read.

  `saving` is the prefix of Orbax's temporary folders, where incomplete files of other processes may be visible too.
  """
  files: dict[int, _File] = {}
  found: dict[int, tuple[int, str]] = {}
  over = threading.Event()

  def follow() -> None:
    last = False
    while not last:
      last = over.wait(_PAUSE)
      # Orbax renames the folder meanwhile; and an error in reading also reaches the writer or write_manifest, which report it.
      with contextlib.suppress(OSError):
        for path in saving.parent.glob(f'{saving.name}*/*/ocdbt.process_{process}/d/*'):
          inode = path.stat().st_ino
          if inode not in files:
            files[inode] = _File(path)
          files[inode].follow()

  thread = threading.Thread(target=follow, name='checksums')
  thread.start()
  try:
    yield found
  finally:
    over.set()
    thread.join()
    for inode, file in files.items():
      os.close(file.descriptor)
      found[inode] = file.read, file.digest.hexdigest()


class _File:
  """A file that is being appended to."""

  def __init__(self, path: Path):
    self.descriptor, self.read, self.digest = os.open(path, os.O_RDONLY), 0, Digest()
    self._buffer = memoryview(bytearray(_CHUNK_BYTES))

  def follow(self) -> None:
    while size := os.preadv(self.descriptor, [self._buffer], self.read):
      self.digest.update(self._buffer[:size])
      self.read += size
    if hasattr(os, 'posix_fadvise'):  # not on macOS
      # Drops the pages that are on the disk, and starts to write out the others.
      os.posix_fadvise(self.descriptor, 0, self.read, os.POSIX_FADV_DONTNEED)
