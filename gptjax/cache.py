"""The cache folder, for files that can be created again."""

from pathlib import Path

from absl import flags

from gptjax.config import UserError
from gptjax.files import expanded

CACHE = '~/.cache/gptjax'
_CACHE_DIR = flags.DEFINE_string('cache_dir', CACHE, 'folder of prepared data and compiled programs')


def cache_dir() -> Path:
  """Returns the folder of --cache_dir; a UserError for a path that TFDS, which stores data there, cannot use."""
  if '**' in _CACHE_DIR.value:
    raise UserError('--cache_dir', _CACHE_DIR.value, "a path without '**'")
  return expanded(_CACHE_DIR.value, '--cache_dir')
