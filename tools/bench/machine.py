"""The machine on which a figure was measured."""

from importlib import metadata

from gptjax.machine import processor


def machine() -> str:
  """Processor, number of cores and versions, as text beside a figure."""
  installed = {d.name for d in metadata.distributions()}
  versions = ', '.join(f'{name} {metadata.version(name)}' for name in ('jax', 'torch', 'transformers') if name in installed)
  return f'{processor()}, {versions}'
