"""The manifest of a checkpoint: what it is of, and the XXH3 of every file; it is written last and compared before use.

128 bits find what disks and networks do to a file, at the speed of memory; against who forges a checkpoint no digest beside it would help.
"""

import contextlib
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
  """A checkpoint that is not what was written; the text says which file, and how it differs."""


def write_manifest(folder: Path, facts: dict[str, Any], known: Mapping[int, tuple[int, str]] = {}) -> None:
  """Writes the manifest of a folder's files, and returns when all of it is on the disk and not only on its way there.

  Args:
    folder: whose files are complete.
    facts: of JSON, what the checkpoint is of.
    known: by inode the size and XXH3 of files that need not be read once more.
  """
  files = sorted(path for path in folder.rglob('*') if path.is_file())
  # Training goes on meanwhile: half of the cores at most.
  with ThreadPoolExecutor(max(1, cores() // 2)) as pool:
    found = dict(zip((str(path.relative_to(folder)) for path in files), pool.map(lambda path: _entry(path, known), files)))
  content = {'facts': facts, 'files': found}
  (folder / MANIFEST).write_text(json.dumps({'xxh3': _self_digest(content), **content}, indent=1) + '\n')
  for path in (*folder.rglob('*'), folder):
    sync(path)


def read_manifest(folder: Path) -> dict[str, Any]:
  """The facts and files of a manifest.

  Raises:
    Damaged: it is missing, or not as it was written.
    OSError: it cannot be read, which may pass.
  """
  try:
    with _telling(folder / MANIFEST):
      manifest = json.loads((folder / MANIFEST).read_bytes())
    content = {'facts': manifest['facts'], 'files': manifest['files']}
    whole = manifest['xxh3'] == _self_digest(content)
  except _MISSING:
    raise Damaged(f'{MANIFEST} is missing') from None
  except (ValueError, LookupError, TypeError, RecursionError):
    whole = False
  if not whole:
    raise Damaged(f'{MANIFEST} is damaged')
  return content


def verify(folder: Path, part: int = 0, parts: int = 1) -> str:
  """What is wrong with a checkpoint, '' where nothing is; of several parts only that part of the files is read.

  Raises:
    OSError: a file cannot be read, as where a network's disk is away: that may pass, and says nothing of what was written.
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
    with _telling(path):
      found = path.stat().st_size
      if found != size:
        return f'{name} has {found:,} bytes, not {size:,}'
      return '' if _digest(path) == digest else f'{name} is not what was written: its XXH3 differs'
  except _MISSING:
    return f'{name} is missing'


@contextlib.contextmanager
def _telling(path: Path) -> Iterator[None]:
  """Names the file in what the system says of it, which reading does not."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(path)) from error  # Python makes it of the same class


def _entry(path: Path, known: Mapping[int, tuple[int, str]]) -> tuple[int, str]:
  status = path.stat()
  size, digest = known.get(status.st_ino, (-1, ''))
  return (size, digest) if size == status.st_size else (status.st_size, _digest(path))


def _digest(path: Path) -> str:
  digest, buffer = Digest(), memoryview(bytearray(2**20))
  with path.open('rb', buffering=0) as file:
    while size := file.readinto(buffer):
      digest.update(buffer[:size])
  return digest.hexdigest()


def _self_digest(content: dict[str, Any]) -> str:
  return Digest(json.dumps(content, sort_keys=True).encode()).hexdigest()

