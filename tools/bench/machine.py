"""The machine on which a figure was measured."""

import os
from importlib import metadata
from pathlib import Path


def machine() -> str:
  """Processor, number of cores and versions, as text beside a figure."""
  names = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in line]
  installed = {d.name for d in metadata.distributions()}
  versions = ', '.join(f'{name} {metadata.version(name)}' for name in ('jax', 'torch', 'transformers') if name in installed)
  return f'{os.cpu_count()} cores of {names[0] if names else "unknown"}, {versions}'
