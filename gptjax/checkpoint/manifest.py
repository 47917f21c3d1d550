"""The manifest of a checkpoint: its metadata and the XXH3 checksum of every file. It is written last, and verified before use.

128 bits detect the damage that disks and networks do, at the speed of memory; no digest stored with the data could prevent forgery.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_128 as Digest

from gptjax.data import cores
from gptjax.files import sync

MANIFEST = 'manifest.json'
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Damaged(Exception):
  """A checkpoint differs from what was written; the text names the file and the difference."""


def write_manifest(folder: Path, facts: dict[str, Any], known: Mapping[int, tuple[int, str]] = {}) -> None:
  """Writes the manifest of a folder's files, and returns when the folder is synced to disk.

  Args:
    folder: with its files complete.
    facts: metadata of the checkpoint, as JSON.
    known: inode -> (size, XXH3) of files that need not be read again.
  """
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  # At most half of the cores, since training continues.
  with ThreadPoolExecutor(max(1, cores() // 2)) as pool:
    found = dict(zip((str(path.relative_to(folder)) for path in files), pool.map(lambda path: _entry(path, known), files)))
  content = {'facts': facts, 'files': found}
  (folder / MANIFEST).write_text(json.dumps({'xxh3': _self_digest(content), **content}, indent=1) + '\n')
  for path in (*folder.rglob('*'), folder):
    sync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
  """Returns the 'facts' and 'files' of a manifest.

  Raises:
    Damaged: it is missing, or its own checksum differs.
    OSError: it cannot be read now.
  """
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


def verify(folder: Path, part: int = 0, parts: int = 1) -> str:
  """Returns the first damage found in a checkpoint, '' if there is none; with several parts only that part of the files is read.

  Raises:
    OSError: a file cannot be read now, for example because a network file system is unavailable.
  """
  try:
    files = read_manifest(folder)['files']
  except Damaged as damaged:
    return str(damaged)
  mine = list(files.items())[part::parts]
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


def _entry(path: Path, known: Mapping[int, tuple[int, str]]) -> tuple[int, str]:
  status = path.stat()
  size, digest = known.get(status.st_ino, (-1, ''))
  return (size, digest) if size == status.st_size else (status.st_size, _digest(path))


def _digest(path: Path) -> str:
  with path.open('rb', buffering=0) as file:
    return hashlib.file_digest(file, Digest).hexdigest()


def _self_digest(content: dict[str, Any]) -> str:
  return Digest(json.dumps(content, sort_keys=True).encode()).hexdigest()
