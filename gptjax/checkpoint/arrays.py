"""Orbax writes and reads the arrays of checkpoints, which are named by their place in the train state: 'step', 'trained/NAME'.

They lie in two folders of a checkpoint: a program that only needs the parameters need not verify the optimizer state, of twice the size.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from etils.epath.gpath import PosixGPath
from orbax.checkpoint import v1 as ocp

from gptjax.config import UserError

PARAMETERS, TRAINING = FOLDERS = 'parameters', 'training'
"""Folders of a checkpoint: of the trained and frozen parameters, and of everything else in a train state."""


def by_name(tree: Any, function: Callable[[Any], Any] = lambda leaf: leaf) -> dict[str, Any]:
  """A function's values on the leaves of a tree by names such as 'trained/NAME'."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): function(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def array_folder(folder: Path) -> Path:
  """Returns the absolute path of a folder for arrays, or raises a UserError if TensorStore cannot use it."""
  folder = folder.absolute()
  if '\\' in str(folder) or any('\ud800' <= character <= '\udfff' for character in str(folder)):
    raise UserError('checkpoint', str(folder), 'a path in UTF-8 without backslashes, which TensorStore takes for slashes')
  return folder


def save(folder: Path, state: Any) -> Callable[[], None]:
  """Starts to write the arrays of a state; the function that this returns waits for the end. All processes must call both."""
  with _context():
    return ocp.save_checkpointables_async(folder, _by_folder(by_name(state)), overwrite=True).result


def array_metadata(checkpoint: Path, folders: Iterable[str] = FOLDERS) -> dict[str, Any]:
  """Orbax's descriptions (shape, dtype) of the arrays in these folders of a checkpoint, by name; none of a folder that it cannot read."""
  with _context():
    return {name: found for folder in folders if (checkpoint / folder).exists()
            for name, found in (ocp.metadata(checkpoint, folder).metadata or {}).items()}


def load(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
  """Loads arrays by name with the given dtypes and shardings; their folders may have others too. All processes must call this."""
  with _context():
    found = ocp.load_checkpointables(folder, _by_folder(wanted))
  return {name: array for part in found.values() for name, array in part.items()}


def _by_folder(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  found: dict[str, dict[str, Any]] = {}
  for name, array in arrays.items():
    found.setdefault(PARAMETERS if name.startswith(('trained/', 'frozen/')) else TRAINING, {})[name] = array
  return found


class _LocalPath(PosixGPath):
  """A path that is taken literally. In etils, patterns also match in the names of the folders above, and /gs/x is a URL."""

  _uri_scheme = None

  def glob(self, pattern: str):
    return (type(self)(path) for path in Path(self).glob(pattern))


def _context() -> ocp.Context:
  context = ocp.Context()
  # Weights do not compress, and without compression a save needs no second copy of the state in memory.
  context.array.saving.use_compression = False
  # A replica writes its part of a large array. A part is cut out by a program of its own, compiled for each array and each device.
  context.array.saving.min_slice_bytes_for_replica_parallel = 2**20
  context.pytree.loading.partial_load = True
  context.file.path_class = _LocalPath
  return context
