"""A save reads its files once, while they are written, and removes them from the page cache."""

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from gptjax.checkpoint import Checkpoints, Progress, Retention, manifest
from gptjax.checkpoint.manifest import streaming_checksums

SIZE = 3 * 2**20 + 5


def folder(tmp_path: Path, process: int = 0) -> Path:
  made = tmp_path / '7.saving.for-now' / 'training' / f'ocdbt.process_{process}' / 'd'
  made.mkdir(parents=True)
  return made


def resident(path: Path) -> int:
  """Pages of a file that the system has in memory."""
  with path.open('r+b') as file, mmap.mmap(file.fileno(), 0) as view:
    pages = -(-len(view) // mmap.PAGESIZE)
    found, start = (ctypes.c_ubyte * pages)(), ctypes.c_char.from_buffer(view)
    assert not ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(view)), found)
    del start
  return sum(one & 1 for one in found)


def test_a_growing_file_gets_the_digest_of_the_complete_file(tmp_path):
  mine, other = folder(tmp_path), folder(tmp_path, 1)
  shutil.copyfile(sys.executable, other / 'of-another-process')
  with streaming_checksums(tmp_path / '7.saving', 0) as followed, (mine / 'data').open('wb') as file:
    for piece in range(6):
      file.write(os.urandom(SIZE + piece))
      file.flush()
      os.fsync(file.fileno())
  path = mine / 'data'
  assert followed == {path.stat().st_ino: (path.stat().st_size, manifest._digest(path))}


@pytest.mark.skipif(not hasattr(os, 'posix_fadvise'), reason='no posix_fadvise')
def test_hashed_files_leave_the_page_cache(tmp_path):
  mine = folder(tmp_path)
  if subprocess.run(['stat', '-f', '-c', '%T', tmp_path], capture_output=True, text=True).stdout.strip() == 'tmpfs':
    pytest.skip('this file system is memory')
  with streaming_checksums(tmp_path / '7.saving', 0), (mine / 'data').open('wb') as file:
    file.write(bytes(SIZE))
    file.flush()
    os.fsync(file.fileno())
  (mine / 'not-followed').write_bytes(bytes(SIZE))
  assert resident(mine / 'not-followed') > SIZE // mmap.PAGESIZE and resident(mine / 'data') == 0


def test_a_save_does_not_read_arrays_again_to_hash_them(tmp_path, monkeypatch):
  read, digest = [], manifest._digest
  monkeypatch.setattr(manifest, '_digest', lambda path: read.append(path.stat().st_size) or digest(path))
  with Checkpoints(tmp_path / 'checkpoints', Retention()) as checkpoints:
    checkpoints.save(Progress(3), {'a': jnp.arange(2**20, dtype=jnp.float32)}, None)
  assert sum(read) < 2**16  # the array has 2**22 bytes
  saved = tmp_path / 'checkpoints' / '3'
  assert not manifest.verify(saved)
  files = json.loads((saved / 'manifest.json').read_text())['files']
  assert {name: [(saved / name).stat().st_size, digest(saved / name)] for name in files} == files


def test_a_file_that_changed_after_it_was_read_is_read_again(tmp_path):
  mine = folder(tmp_path)
  path, complete = mine / 'data', tmp_path / '7.saving.for-now'
  with streaming_checksums(tmp_path / '7.saving', 0) as followed:
    path.write_bytes(b'a part')
  path.write_bytes(b'all of it')
  manifest.write_part(complete, 0, followed)
  manifest.write_manifest(complete, {}, 1)
  assert not manifest.verify(complete)


@pytest.mark.skipif(sys.platform != 'linux', reason='threads have no priorities of their own')
def test_no_thread_that_a_save_waits_for_has_a_lower_priority(tmp_path):
  usual, found, state = os.getpriority(os.PRIO_PROCESS, 0), set(), {'a': jnp.ones(64)}
  with Checkpoints(tmp_path, Retention()) as checkpoints:
    checkpoints.prepare(state)
    checkpoints.save(Progress(1), state, None)
    for thread in os.listdir('/proc/self/task'):
      with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        found.add(os.getpriority(os.PRIO_PROCESS, int(thread)))
  assert found == {usual}
