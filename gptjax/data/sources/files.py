"""Files, local or behind URLs: listing, reading and decompressing."""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import json
import os
import posixpath
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gptjax.config import SourceConfig, UserError
from gptjax.data.folders import file_system, storage_errors
from gptjax.data.sources.source import Source
from gptjax.files import expanded

_PACKINGS = ('.gz', '.zst')
_CHUNK = 2**16  # compressed bytes per read: few, since their decompressed size has no bound


@dataclasses.dataclass(frozen=True)
class File:
  """A file that is not empty."""

  path: str
  """path or URL"""
  name: str
  """path relative to the folder, or to that of a glob before its first wildcard"""
  size: int
  """bytes"""
  version: str
  """changes with the file: its modification time or hash"""


def packing(name: str) -> str:
  """The ending of a compressed file's name, in lower case; '' for other files."""
  return next((ending for ending in _PACKINGS if name.lower().endswith(ending)), '')


def find(pattern: str) -> tuple[list[File], bool]:
  """Lists the file at a path or URL, the files in a folder at any depth, or the files that match a glob, sorted by name.

  Also returns whether it is a folder. Hidden and empty files are omitted. Raises a UserError if nothing is found.
  """
  with storage_errors('data.source.path', pattern):
    found, is_folder = (_remote if '://' in pattern else _local)(pattern)
    if not found and not is_folder:
      raise UserError('data.source.path', pattern, 'a file, a folder or a glob that matches files', names=_siblings(pattern))
  files = {file.name: file for file in found if file.size}
  if not files:
    raise UserError('data.source.path', pattern, 'files that are not empty')
  return [files[name] for name in sorted(files)], is_folder


def title(pattern: str) -> str:
  """The name of the file or folder, or the glob from its first wildcard on."""
  if '://' not in pattern and os.path.exists(os.path.expanduser(pattern)):
    return expanded(pattern).resolve().name
  fixed = _fixed_part(pattern)
  return pattern[len(fixed):].lstrip('/') if glob.has_magic(pattern) else posixpath.basename(pattern.rstrip('/'))


class FileSource(Source):
  """A source of files; `kind` and `option`, how they are read, are for the fingerprint."""

  def __init__(self, files: Sequence[File], description: str, config: SourceConfig, kind: str, option: str):
    self.files, self.description, self.skip, self.has_examples = files, description, config.skip, config.has_examples
    self.labels = config.labels
    self.size = sum(file.size for file in files)
    self._kind, self._option = kind, option

  def fingerprint(self) -> str:
    listed = [(file.name, file.size, file.version) for file in self.files]
    return hashlib.sha256(json.dumps([self._kind, self._option, listed]).encode()).hexdigest()


@contextlib.contextmanager
def opened(path: str, readahead: int = 0) -> Iterator[BinaryIO]:
  """Opens a path or URL, of which requests fetch `readahead` more bytes; raises a UserError if this or reading inside it fails."""
  with storage_errors('data.source.path', path), contextlib.ExitStack() as stack:
    if '://' in path:
      system, location = file_system(path)
      cache = {'cache_type': 'readahead', 'block_size': readahead} if readahead else {'cache_type': 'none'}
      yield stack.enter_context(system.open(location, 'rb', **cache))
    else:
      yield stack.enter_context(open(path, 'rb'))


def _siblings(pattern: str) -> list[str]:
  """Existing paths of which this one may be a misspelling."""
  folder = posixpath.dirname(pattern)
  with contextlib.suppress(OSError):
    system, location = file_system(folder or '.')
    return [posixpath.join(folder, posixpath.basename(name)) for name in system.ls(location, detail=False)]
  return []


def _fixed_part(pattern: str) -> str:
  """The folders of a glob before its first wildcard."""
  folder = posixpath.dirname(pattern)
  while glob.has_magic(folder):
    folder = posixpath.dirname(folder)
  return folder


def _local(pattern: str) -> tuple[list[File], bool]:
  """The files, and whether they are in a folder."""
  path = expanded(pattern)
  root, found = path.parent, [str(path)]
  if is_folder := path.is_dir():
    root, found = path, glob.glob(os.path.join(glob.escape(str(path)), '**', '*'), recursive=True)
  elif not path.is_file():
    root, found = Path(_fixed_part(str(path))), glob.glob(str(path), recursive=True)
  paths = [Path(name) for name in found if os.path.isfile(name)]
  stats = ((file, file.stat()) for file in paths)
  return [File(str(file), file.relative_to(root).as_posix(), stat.st_size, str(stat.st_mtime_ns)) for file, stat in stats], is_folder


def _remote(pattern: str) -> tuple[list[File], bool]:
  system, location = file_system(pattern)
  system.invalidate_cache()
  is_folder = False
  try:
    info = system.info(location)
  except FileNotFoundError:
    root = _fixed_part(location)
    found = system.glob(location, detail=True) if glob.has_magic(location) else {}
  else:
    is_folder = info['type'] == 'directory'
    root = location if is_folder else posixpath.dirname(location)
    found = system.find(location, detail=True) if is_folder else {location: info}
  names = {path: path[len(root):].lstrip('/') for path, info in found.items() if info['type'] == 'file'}
  # Each file system has its own key for a version.
  version = lambda info: next((info[key] for key in ('ETag', 'etag', 'LastModified', 'updated', 'mtime', 'created') if key in info), '')
  return [File(system.unstrip_protocol(path), name, found[path]['size'] or 0, str(version(found[path]))) for path, name in names.items()
          if not any(part.startswith('.') for part in name.split('/'))], is_folder


class Stream:
  """A sliding window over the decompressed bytes of a .gz or .zst file; raises a UserError if the file is broken or truncated."""

  # Not fsspec or zstandard's stream_reader, because those end silently where a .zst file is truncated.

  def __init__(self, raw: BinaryIO, path: str):
    self._chunks = _decompressed(raw, path)
    self._data = bytearray()
    self._start = 0

  def reach(self, stop: int) -> int:
    """Decompresses up to offset `stop`; returns it or the end of the file."""
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
  new_decoder: Any = functools.partial(zlib.decompressobj, wbits=31)
  decoding_error: type[Exception] = zlib.error
  if packing(path) == '.zst':
    import zstandard
    # For files made with --long: by default zstandard refuses windows above 128 MB.
    new_decoder, decoding_error = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, zstandard.ZstdError
  decoder: Any = None  # one per member: a file of either format may be several, concatenated
  while chunk := raw.read(_CHUNK):
    while chunk:
      decoder = decoder or new_decoder()
      try:
        yield decoder.decompress(chunk)
      except decoding_error as error:
        raise UserError('data.source.path', path, f'an undamaged file (broken {packing(path)} data: {error})') from None
      chunk, decoder = (decoder.unused_data, None) if decoder.eof else (b'', decoder)
  if decoder:
    raise UserError('data.source.path', path, 'an undamaged file (it ends early)')
