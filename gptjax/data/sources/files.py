"""Files, local or behind URLs: listing, reading and decompressing."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import posixpath
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.config import UserError
from gptjax.data.folders import storage_errors
from gptjax.data.packages import optional
from gptjax.files import expanded

_CLIENTS = {'s3': 's3fs', 's3a': 's3fs', 'gs': 'gcsfs', 'gcs': 'gcsfs'}
"""Packages through which fsspec reads object stores, by URL scheme."""

SUFFIXES = ('.gz', '.zst')
"""Of compressed files."""

_CHUNK = 2**16
"""Compressed bytes per read: few, since their decompressed size has no bound."""


@dataclasses.dataclass(frozen=True)
class File:
  """A file that is not empty."""

  path: str
  """path or URL"""
  name: str
  """path relative to the folder, or to the part of a glob before its first wildcard"""
  size: int
  """bytes"""
  version: str
  """changes with the file: its modification time or hash"""


def find(pattern: str, suffixes: tuple[str, ...]) -> list[File]:
  """Lists the file at a path, the files in a folder at any depth, or the files that match a glob, sorted by name.

  Hidden and empty files are omitted, and in a folder those without one of the suffixes. URLs may be any that fsspec supports.

  Raises:
    UserError: nothing is found, or it cannot be read.
  """
  with storage_errors('data.source.path', pattern):
    found = (_remote if '://' in pattern else _local)(pattern, suffixes)
  files = {file.name: file for file in found if file.size}
  if not files:
    raise UserError('data.source.path', pattern, 'files that are not empty')
  return [files[name] for name in sorted(files)]


def title(pattern: str) -> str:
  """A name that does not depend on the location: of the file or folder, or the glob from its first wildcard on."""
  if '://' not in pattern and os.path.exists(os.path.expanduser(pattern)):
    return expanded(pattern).resolve().name
  fixed = _fixed_part(pattern)
  return pattern[len(fixed):].lstrip('/') if glob.has_magic(pattern) else posixpath.basename(pattern.rstrip('/'))


def fingerprint(kind: str, files: Iterable[File], *options: str) -> str:
  """Hex digest of a list of files and of the options with which they are read."""
  listed = [(file.name, file.size, file.version) for file in files]
  return hashlib.sha256(json.dumps([kind, *options, listed]).encode()).hexdigest()


@contextlib.contextmanager
def opened(path: str, readahead: int = 0) -> Iterator[BinaryIO]:
  """Opens the file at a path or URL; for sequential reading, each remote request fetches `readahead` more bytes.

  Raises:
    UserError: it cannot be opened, or reading fails inside the context.
  """
  with storage_errors('data.source.path', path):
    if '://' in path:
      system, location = _file_system(path)
      cache = {'cache_type': 'readahead', 'block_size': readahead} if readahead else {'cache_type': 'none'}
      with system.open(location, 'rb', **cache) as file:
        yield file
    else:
      with open(path, 'rb') as file:
        yield file


def _missing(pattern: str, siblings: Iterable[str]) -> UserError:
  names = [posixpath.join(posixpath.dirname(pattern), name) for name in siblings]
  return UserError('data.source.path', pattern, 'a file, a folder or a glob that matches files', names=names)


def _no_supported_files(pattern: str, suffixes: tuple[str, ...]) -> UserError:
  other = posixpath.join(pattern, '**', '*.c')
  return UserError('data.source.path', pattern, f"a folder with files of a supported type ({' '.join(suffixes)}); for others, a glob "
                   f"such as '{other}'")


def _fixed_part(pattern: str) -> str:
  """The folders of a glob before its first wildcard."""
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
      raise _no_supported_files(pattern, suffixes)
  else:
    root, found = Path(_fixed_part(str(path))), _glob(str(path), ('',))
  if not found:
    raise _missing(pattern, os.listdir(path.parent) if path.parent.is_dir() else ())
  stats = ((file, file.stat()) for file in found)
  return [File(str(file), file.relative_to(root).as_posix(), stat.st_size, str(stat.st_mtime_ns)) for file, stat in stats]


def _glob(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
  return [Path(name) for name in glob.glob(pattern, recursive=True) if name.endswith(suffixes) and os.path.isfile(name)]


def _file_system(url: str) -> tuple[Any, str]:
  """The fsspec file system of a URL, and the path within it."""
  try:
    return optional('fsspec', 'data.source.path', url).core.url_to_fs(url)
  except ImportError as error:
    package = _CLIENTS.get(url.partition('://')[0])
    expected = f'a machine with the {package} package: pip install {package}' if package else str(error)
    raise UserError('data.source.path', url, expected) from None


def _remote(pattern: str, suffixes: tuple[str, ...]) -> list[File]:
  system, location = _file_system(pattern)
  system.invalidate_cache()
  try:
    info = system.info(location)
  except FileNotFoundError:
    root = _fixed_part(location)
    found = system.glob(location, detail=True) if glob.has_magic(location) else {}
    if not found:
      raise _missing(pattern, _names(system, posixpath.dirname(location))) from None
  else:
    is_folder = info['type'] == 'directory'
    root = location if is_folder else posixpath.dirname(location)
    found = system.find(location, detail=True) if is_folder else {location: info}
    found = {name: info for name, info in found.items() if not is_folder or name.endswith(suffixes)}
    if not found:
      raise _no_supported_files(pattern, suffixes)
  files = ((name, name[len(root):].lstrip('/'), info) for name, info in found.items() if info['type'] == 'file')
  return [File(system.unstrip_protocol(path), name, info['size'] or 0, _version(info)) for path, name, info in files
          if not any(part.startswith('.') for part in name.split('/'))]


def _names(system: Any, folder: str) -> list[str]:
  try:
    return [posixpath.basename(name) for name in system.ls(folder, detail=False)]
  except FileNotFoundError:
    return []


def _version(info: dict[str, Any]) -> str:
  # Each file system has its own key for it.
  return str(next((info[key] for key in ('ETag', 'etag', 'LastModified', 'updated', 'mtime', 'created') if key in info), ''))


def stem(name: str) -> str:
  """A file's name without .gz or .zst."""
  return name.removesuffix('.gz').removesuffix('.zst')


class Stream:
  """A sliding window over the decompressed bytes of a file, which is read sequentially; the suffix of its path decides the format.

  Not fsspec or zstandard's stream_reader, because those end silently where a .zst file is truncated.

  Raises:
    OSError: on reading, the file is broken or truncated.
    UserError: the package that reads it is not installed.
  """

  def __init__(self, raw: BinaryIO, path: str):
    self._chunks = _decompressed(raw, path)
    self._data = bytearray()
    self._start = 0

  def reach(self, stop: int) -> int:
    """Decompresses up to offset `stop`; returns it, or the end of the file if that comes first."""
    while self._start + len(self._data) < stop and (chunk := next(self._chunks, None)) is not None:
      self._data += chunk
    return min(stop, self._start + len(self._data))

  def read(self, start: int, stop: int) -> bytes:
    """Bytes from `start`, which must not have been dropped, to `stop` or the end of the file."""
    self.reach(stop)
    return bytes(memoryview(self._data)[start - self._start:stop - self._start])

  def drop(self, stop: int) -> None:
    """Discards the bytes before `stop`."""
    del self._data[:stop - self._start]
    self._start = stop


def _decompressed(raw: BinaryIO, path: str) -> Iterator[bytes]:
  new_decoder, decoding_error = _codec(path)
  decoder = None  # one per member: a file of either format may be several, concatenated
  while chunk := raw.read(_CHUNK):
    while chunk:
      decoder = decoder or new_decoder()
      try:
        yield decoder.decompress(chunk)
      except decoding_error as error:
        raise OSError(f'broken {path[path.rfind("."):]} data: {error}') from None
      chunk, decoder = (decoder.unused_data, None) if decoder.eof else (b'', decoder)
  if decoder:
    raise OSError('it ends early')


def _codec(path: str) -> tuple[Callable[[], Any], type[Exception]]:
  if path.endswith('.gz'):
    return lambda: zlib.decompressobj(wbits=31), zlib.error
  zstandard = optional('zstandard', 'data.source.path', path)
  # For files made with --long: by default zstandard refuses windows above 128 MB.
  return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, zstandard.ZstdError
