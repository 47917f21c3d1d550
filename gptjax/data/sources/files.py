"""Files here and behind URLs: which there are, how large they are, and their bytes."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.config import UserError
from gptjax.data.folders import remote_errors
from gptjax.data.sources.packages import optional
from gptjax.files import expanded

_CLIENTS = {'s3': 's3fs', 's3a': 's3fs', 'gs': 'gcsfs', 'gcs': 'gcsfs'}
"""fsspec's packages for object stores, by what their URLs begin with."""


@dataclasses.dataclass(frozen=True)
class File:
  """A file that is not empty."""

  path: str
  """where it is: a path or a URL"""
  name: str
  """its path below the folder, or below the part of the glob that has no wildcard"""
  size: int
  """bytes"""
  changed: str
  """another one after the file changed: its time or its hash"""


def find(pattern: str, suffixes: tuple[str, ...]) -> list[File]:
  """The file that a pattern names, a folder's files (at any depth) or the files that a glob matches, by their names.

  Hidden files and files without a single byte are left out.

  Args:
    pattern: a path, or a URL that fsspec knows.
    suffixes: what the names of a folder's files end with; a path or a glob finds any file.

  Raises:
    UserError: there is nothing, or nothing in it, or it cannot be read.
  """
  with _errors(pattern):
    found = (_remote if '://' in pattern else _local)(pattern, suffixes)
  files = {file.name: file for file in found if file.size}
  if not files:
    raise UserError('data.source.path', pattern, 'files that are not empty')
  return [files[name] for name in sorted(files)]


def title(pattern: str) -> str:
  """What a pattern is called wherever it lies: the name of the file or folder, or a glob from its first wildcard on."""
  if '://' not in pattern and os.path.exists(os.path.expanduser(pattern)):
    return expanded(pattern).resolve().name
  fixed = _fixed_part(pattern)
  return pattern[len(fixed):].lstrip('/') if glob.has_magic(pattern) else posixpath.basename(pattern.rstrip('/'))


def fingerprint(kind: str, files: Iterable[File], *how: str) -> str:
  """Hex digest of files as they are listed, and of how they are read."""
  listed = [(file.name, file.size, file.changed) for file in files]
  return hashlib.sha256(json.dumps([kind, *how, listed]).encode()).hexdigest()


@contextlib.contextmanager
def opened(path: str, ahead: int = 0) -> Iterator[BinaryIO]:
  """A file to read and seek in; `ahead`: bytes that a remote one fetches beyond what is asked, for who reads on and on.

  Raises:
    UserError: it cannot be opened, or not be read while the body runs.
  """
  with _errors(path):
    if '://' in path:
      system, place = _file_system(path)
      cache = {'cache_type': 'readahead', 'block_size': ahead} if ahead else {'cache_type': 'none'}
      with system.open(place, 'rb', **cache) as file:
        yield file
    else:
      with open(path, 'rb') as file:
        yield file


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
  if '://' in path:
    with remote_errors('data.source.path', path):
      yield
  else:
    try:
      yield
    except OSError as error:
      raise UserError('data.source.path', path, f'what can be read ({error.strerror or error})') from None


def _missing(pattern: str, suffixes: tuple[str, ...], siblings: Iterable[str]) -> UserError:
  names = [posixpath.join(posixpath.dirname(pattern), name) for name in siblings]
  return UserError('data.source.path', pattern, 'a file, a folder or a glob that matches files', names=names)


def _empty(pattern: str, suffixes: tuple[str, ...]) -> UserError:
  other = posixpath.join(pattern, '**', '*.c')
  expected = f"a folder with files to read ({' '.join(suffixes)}); for others, a glob such as '{other}'"
  return UserError('data.source.path', pattern, expected)


def _fixed_part(pattern: str) -> str:
  """The folders a glob starts with, up to its first wildcard."""
  folder = posixpath.dirname(pattern)
  while glob.has_magic(folder):
    folder = posixpath.dirname(folder)
  return folder


def _local(pattern: str, suffixes: tuple[str, ...]) -> list[File]:
  path = expanded(pattern)
  if path.is_file():
    root, found = path.parent, [path]
  elif path.is_dir():
    root, found = path, _glob(os.path.join(glob.escape(str(path)), '**', '*'), suffixes)
    if not found:
      raise _empty(pattern, suffixes)
  else:
    root, found = Path(_fixed_part(str(path))), _glob(str(path), ('',))
  if not found:
    raise _missing(pattern, suffixes, os.listdir(path.parent) if path.parent.is_dir() else ())
  stats = ((file, file.stat()) for file in found)
  return [File(str(file), file.relative_to(root).as_posix(), stat.st_size, str(stat.st_mtime_ns)) for file, stat in stats]


def _glob(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
  return [Path(name) for name in glob.glob(pattern, recursive=True) if name.endswith(suffixes) and os.path.isfile(name)]


def _file_system(url: str) -> tuple[Any, str]:
  """fsspec's file system of a URL, and what that calls the place."""
  try:
    return optional('fsspec', url).core.url_to_fs(url)
  except ImportError as error:
    package = _CLIENTS.get(url.partition('://')[0])
    expected = f'a machine with the {package} package: pip install {package}' if package else str(error)
    raise UserError('data.source.path', url, expected) from None


def _remote(pattern: str, suffixes: tuple[str, ...]) -> list[File]:
  system, place = _file_system(pattern)
  system.invalidate_cache()
  try:
    info = system.info(place)
  except FileNotFoundError:
    root = _fixed_part(place)
    found = system.glob(place, detail=True) if glob.has_magic(place) else {}
    if not found:
      raise _missing(pattern, suffixes, _listed(system, posixpath.dirname(place))) from None
  else:
    folder = info['type'] == 'directory'
    root = place if folder else posixpath.dirname(place)
    found = system.find(place, detail=True) if folder else {place: info}
    found = {name: info for name, info in found.items() if not folder or name.endswith(suffixes)}
    if not found:
      raise _empty(pattern, suffixes)
  files = ((name, name[len(root):].lstrip('/'), info) for name, info in found.items() if info['type'] == 'file')
  return [File(system.unstrip_protocol(path), name, info['size'] or 0, _changed(info)) for path, name, info in files
          if not any(part.startswith('.') for part in name.split('/'))]


def _listed(system: Any, folder: str) -> list[str]:
  try:
    return [posixpath.basename(name) for name in system.ls(folder, detail=False)]
  except FileNotFoundError:
    return []


def _changed(info: dict[str, Any]) -> str:
  # Each file system has a name of its own for it.
  return str(next((info[key] for key in ('ETag', 'etag', 'LastModified', 'updated', 'mtime', 'created') if key in info), ''))
