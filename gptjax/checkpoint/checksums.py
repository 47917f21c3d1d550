"""Reads what a save writes while the system has it in memory, for the digests, and has it let go of.

The system keeps in memory what was written, for who reads it soon. Nobody reads a checkpoint soon, and the run has better uses of the
memory: taking so many new pages is also most of the work of writing where a host takes unused memory back from a virtual machine.
"""

import contextlib
import os
import threading
from pathlib import Path

from gptjax.checkpoint.manifest import Digest

_PAUSE = 0.01
"""Seconds between two looks: what is written meanwhile is a few pieces of _PIECE."""
_PIECE = 2**20


class StreamingChecksums:
  """Follows the files that this process writes into one checkpoint; a context, inside of which they grow.

  Args:
    saving: folder of the checkpoint; Orbax writes beside it until all is there.
    process: number of this one. What others write to a shared disk may be seen here before it is whole.
  """

  def __init__(self, saving: Path, process: int):
    self._saving, self._process = saving, process
    self._files: dict[int, _File] = {}
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._follow, name='following')  # of the priority of the thread that makes it

  @property
  def found(self) -> dict[int, tuple[int, str]]:
    """By inode the size and the digest of what was read, when the writer has ended."""
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
      self._look()
    self._look()

  def _look(self) -> None:
    # A folder gets its last name meanwhile; and what cannot be read the writer meets too, or who seals the checkpoint, and tells it.
    with contextlib.suppress(OSError):
      for path in self._saving.parent.glob(f'{self._saving.name}*/*/ocdbt.process_{self._process}/d/*'):
        inode = path.stat().st_ino
        if inode not in self._files:
          self._files[inode] = _File(path)
        self._files[inode].follow()


class _File:
  """A file that grows at its end."""

  def __init__(self, path: Path):
    self.descriptor, self.read, self.digest = os.open(path, os.O_RDONLY), 0, Digest()
    self._buffer = memoryview(bytearray(_PIECE))

  def follow(self) -> None:
    while size := os.preadv(self.descriptor, [self._buffer], self.read):
      self.digest.update(self._buffer[:size])
      self.read += size
    if hasattr(os, 'posix_fadvise'):  # not on macOS
      # What is on the disk by now goes; of the rest the writing is begun.
      os.posix_fadvise(self.descriptor, 0, self.read, os.POSIX_FADV_DONTNEED)
