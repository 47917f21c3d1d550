"""The process's heap on a CPU: memory that one train step frees is reused by the next one instead of being returned to the system."""

import contextlib
import ctypes
import os
import platform
import sys
from glob import glob
from pathlib import Path

_ARENA_MAX, _MMAP_MAX, _TOP_PAD, _TRIM_THRESHOLD = -8, -4, -2, -1  # glibc's malloc.h
_MADV_HUGEPAGE = 14  # Linux's mman.h
_HUGE_PAGE = 2 << 20
_CONTAINER_LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')
"""cgroup v2 and v1"""
_ACCELERATORS = ('/dev/nvidia[0-9]*', '/dev/kfd', '/dev/dxg', '/dev/accel[0-9]*', '/dev/vfio/[0-9]*')
"""device files of GPUs (NVIDIA, AMD, under Windows) and TPUs"""


def runs_on_cpu() -> bool:
  """Whether JAX will run on the CPU, as far as can be seen without importing it; a wrong answer changes only speed.

  JAX_PLATFORMS decides, or else the absence of an accelerator; an installed libtpu does not count, since it may serve planning alone.
  """
  if platforms := os.environ.get('JAX_PLATFORMS'):
    return platforms.partition(',')[0] == 'cpu'
  return not any(map(glob, _ACCELERATORS))


def keep_freed_memory() -> bool:
  """Makes glibc's malloc keep freed memory, on huge pages; returns whether it does. Other C libraries are left alone.

  XLA allocates a step's temporaries, up to gigabytes, in every step. By default malloc maps and unmaps them, and the kernel zeroes all
  their pages, which takes up to a third of a small step. The price: the process keeps the memory of one more step's temporaries, and in its
  first steps of up to three more, because posix_memalign leaves holes until each thread's cache of small blocks is full. Must be called
  before JAX is imported, while there are no threads.
  """
  if 'jax' in sys.modules or platform.libc_ver()[0] != 'glibc':
    return False
  libc = ctypes.CDLL(None)
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  # One arena, because those of other threads map whatever exceeds 64 MiB; no mapping of large blocks; no trimming of the heap.
  kept = all([libc.mallopt(_ARENA_MAX, 1), libc.mallopt(_MMAP_MAX, 0), libc.mallopt(_TRIM_THRESHOLD, -1), libc.mallopt(_TOP_PAD, 64 << 20)])
  # Grows the heap and asks for huge pages in it, without touching any. Where malloc refuses so much, or the kernel has no huge pages,
  # memory is kept on small ones.
  size = _available_memory() // 2
  if start := libc.malloc(size):
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, (start + size - first) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
    libc.free(start)
  return bool(kept)


def _available_memory() -> int:
  """Bytes of the machine, or of the container where it has less."""
  found = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
  for file in _CONTAINER_LIMITS:
    with contextlib.suppress(OSError, ValueError):  # 'max': no limit
      found.append(int(Path(file).read_text()))
  return min(found)
