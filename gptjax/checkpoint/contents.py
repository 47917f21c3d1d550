"""The tensors of a checkpoint, for tools that inspect it without its run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gptjax.checkpoint.manifest import verify
from gptjax.config import UserError

_CHUNK_BYTES = 2**28
"""Bytes of tensors to load at once; each load takes a quarter of a second regardless of its size."""


def by_name(tree: Any, function: Callable[[Any], Any]) -> dict[str, Any]:
  """A function's values on the leaves of a tree, or of Orbax's metadata of one, by names such as 'trained/NAME'."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): function(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


class Contents:
  """Tensors of an intact checkpoint (else a UserError): 'step', 'trained/NAME', 'frozen/NAME', 'optimizer/.../NAME', 'statistics/...'."""

  def __init__(self, folder: Path):
    if wrong := verify(folder):
      raise UserError('checkpoint', str(folder), f'an intact checkpoint; {wrong}')
    self._folder = folder.absolute()
    metadata, sharding = ocp.metadata(self._folder).metadata, SingleDeviceSharding(jax.local_devices()[0])
    self._tree = jax.tree.structure(metadata)
    self.shapes: dict[str, jax.ShapeDtypeStruct] = by_name(
      metadata, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding))

  def read(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields these tensors in order, with only some of them in memory at a time."""
    chunk: list[str] = []
    for name in names:
      if chunk and sum(shape.size * shape.dtype.itemsize for shape in (self.shapes[one] for one in (*chunk, name))) > _CHUNK_BYTES:
        yield from self._load(chunk)
        chunk = []
      chunk.append(name)
    yield from self._load(chunk)

  def _load(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    wanted = [shape if name in names else ocp.PLACEHOLDER for name, shape in self.shapes.items()]
    loaded = ocp.load(self._folder, jax.tree.unflatten(self._tree, wanted))
    leaves = dict(zip(self.shapes, jax.tree.leaves(loaded, is_leaf=lambda leaf: leaf is ocp.PLACEHOLDER)))
    for name in names:
      yield name, np.asarray(leaves[name])
