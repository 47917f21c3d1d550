"""Memory that stays with the process: what a train step on a CPU frees is what the next one takes."""

import contextlib
import ctypes
import os
import sys
from glob import glob
from pathlib import Path

_ARENA_MAX, _MMAP_MAX, _TOP_PAD, _TRIM_THRESHOLD = -8, -4, -2, -1  # malloc.h of glibc
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20
_LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')
"""of a container, cgroup v2 and v1"""
_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/kfd', '/dev/dxg', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
"""device files of GPUs and TPUs"""


def keep_freed_memory() -> bool:
  """Makes malloc keep what is freed, on huge pages; returns whether it does from now on.

  XLA allocates a step's temporaries, gigabytes, in each step. By default malloc maps them and unmaps them again, and the kernel zeroes
  every page of 4 KiB each time, a sixth to a third of a step's CPU time. To be called before JAX is imported, since its threads then
  have allocators of their own. The process grows by up to about one more step's temporaries, and no memory goes back to the system.
  Without glibc nothing is changed.
  """
  if 'jax' in sys.modules or not _has_glibc():
    return False
  libc = ctypes.CDLL(None)
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  # One heap for all threads: others would map what exceeds 64 MiB. It takes what is large too, and is never trimmed.
  kept = all([libc.mallopt(_ARENA_MAX, 1), libc.mallopt(_MMAP_MAX, 0), libc.mallopt(_TRIM_THRESHOLD, -1), libc.mallopt(_TOP_PAD, 64 << 20)])
  # Grows the heap and marks its pages; no page is touched, so none is taken yet. What malloc refuses or the kernel does not know, as
  # under a limit of address space, is left out: the memory is kept all the same, on small pages.
  size = _memory() // 2
  if start := libc.malloc(size):
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, (start + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    libc.free(start)
  return kept


def runs_on_cpu() -> bool:
  """Whether JAX will choose the CPU, as far as can be seen without importing it.

  JAX_PLATFORMS says so, or the machine has no accelerator. A plugin for one that is installed says nothing: plans for TPUs need libtpu
  on machines that have none. A wrong answer costs speed or memory, never a result.
  """
  if platforms := os.environ.get('JAX_PLATFORMS'):
    return platforms.partition(',')[0] == 'cpu'
  return not any(glob(pattern) for pattern in _ACCELERATORS)


def _has_glibc() -> bool:
  try:
    return os.confstr('CS_GNU_LIBC_VERSION') is not None
  except (AttributeError, ValueError, OSError):  # other systems; macOS and musl know no such name
    return False


def _memory() -> int:
  """Bytes that this process may use: of the machine, or of its container."""
  found = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  for file in _LIMITS:
    with contextlib.suppress(OSError, ValueError):  # 'max': no limit
      found.append(int(Path(file).read_text()))
  return min(found)
