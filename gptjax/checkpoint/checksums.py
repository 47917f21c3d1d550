"""Streaming checksums: the files of a save are hashed while they are written, and then dropped from the system's page cache.

Nobody reads a checkpoint soon, and the run has better uses for the memory; on virtual machines whose host reclaims unused memory,
allocating so many pages is also most of the cost of a save.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from gptjax.checkpoint.manifest import Digest

_PAUSE = 0.01
"""Seconds between two scans, in which a few _CHUNK_BYTES are written."""
_CHUNK_BYTES = 2**20


@contextlib.contextmanager
def streaming_checksums(saving: Path, process: int) -> Iterator[dict[int, tuple[int, str]]]:
  """Hashes the files that this process writes into one checkpoint in the body.

  Args:
    saving: prefix of the temporary folders that Orbax writes to.
    process: index of this process; files of the others may be visible on a shared disk before they are complete.

  Yields:
    A dict that after the body maps inode -> (size, digest) of the bytes that were read.
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

  thread = threading.Thread(target=follow, name='checksums')  # inherits the priority of the thread that creates it
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
