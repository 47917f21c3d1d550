"""Streaming checksums: the files of a save are hashed while they are written, and then dropped from the system's page cache.

Nobody reads a checkpoint soon, and the run has better uses for the memory; on virtual machines whose host reclaims unused memory,
allocating so many pages is also most of the cost of a save.
"""

import contextlib
import os
import threading
from pathlib import Path

from gptjax.checkpoint.manifest import Digest

_PAUSE = 0.01
"""Seconds between two scans, in which a few _CHUNK_BYTES are written."""
_CHUNK_BYTES = 2**20


class StreamingChecksums:
  """Hashes the files that this process writes into one checkpoint. A context manager around the save.

  Args:
    saving: prefix of the temporary folders that Orbax writes to.
    process: index of this process; files of the others may be visible on a shared disk before they are complete.
  """

  def __init__(self, saving: Path, process: int):
    self._saving, self._process = saving, process
    self._files: dict[int, _File] = {}
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._follow, name='checksums')  # inherits the priority of the thread that creates it

  @property
  def by_inode(self) -> dict[int, tuple[int, str]]:
    """Inode -> (size, digest) of the bytes that were read; to be used after the context."""
    return {inode: (file.read, file.digest.hexdigest()) for inode, file in self._files.items()}

  def __enter__(self) -> 'StreamingChecksums':
    self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    self._over.set()
    self._thread.join()
    for file in self._files.values():
      os.close(file.descriptor)

  def _follow(self) -> None:
    while not self._over.wait(_PAUSE):
      self._scan()
    self._scan()

  def _scan(self) -> None:
    # Orbax renames the folder meanwhile; and an error in reading also reaches the writer or write_manifest, which report it.
    with contextlib.suppress(OSError):
      for path in self._saving.parent.glob(f'{self._saving.name}*/*/ocdbt.process_{self._process}/d/*'):
        inode = path.stat().st_ino
        if inode not in self._files:
          self._files[inode] = _File(path)
        self._files[inode].follow()


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
