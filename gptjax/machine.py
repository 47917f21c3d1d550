"""The machine that a process runs on."""

import os
import platform
from pathlib import Path


def processor() -> str:
  """The number of cores, and the name of the processor where it is known."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:  # not Linux
    lines = []
  names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  return f'{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}'
