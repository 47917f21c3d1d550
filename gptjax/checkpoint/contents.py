"""What is in a checkpoint, tensor by tensor, for those that look at it and know nothing of its run."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gptjax.checkpoint.manifest import verify
from gptjax.config import UserError

_AT_ONCE = 2**28
"""Bytes that are read at once; each reading takes a quarter of a second whatever its size."""


class Contents:
  """The tensors of a checkpoint by name: 'step', 'parameters/NAME', 'optimizer/.../NAME', 'statistics/...'.

  Args:
    folder: of the checkpoint.

  Raises:
    UserError: there is none, or it is damaged.
  """

  def __init__(self, folder: Path):
    if wrong := verify(folder):
      raise UserError('checkpoint', str(folder), f'a whole checkpoint; {wrong}')
    self._folder = folder.absolute()
    found, self._tree = jax.tree_util.tree_flatten_with_path(ocp.metadata(self._folder).metadata)
    self._leaves = {jax.tree_util.keystr(path, simple=True, separator='/'): jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0])) for path, leaf in found}

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every tensor."""
    return dict(self._leaves)

  def read(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """These tensors, in this order; some at a time are in memory."""
    group: list[str] = []
    for name in names:
      if group and sum(self._bytes(one) for one in (*group, name)) > _AT_ONCE:
        yield from self._load(group)
        group = []
      group.append(name)
    yield from self._load(group)

  def _bytes(self, name: str) -> int:
    shape = self._leaves[name]
    return shape.size * shape.dtype.itemsize

  def _load(self, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    wanted = [shape if name in names else ocp.PLACEHOLDER for name, shape in self._leaves.items()]
    loaded = ocp.load(self._folder, jax.tree.unflatten(self._tree, wanted))
    leaves = dict(zip(self._leaves, jax.tree.leaves(loaded, is_leaf=lambda leaf: leaf is ocp.PLACEHOLDER)))
    for name in names:
      yield name, np.asarray(leaves[name])
