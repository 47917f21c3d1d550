"""A copy of the state for the writer, on CPUs, so that the next step may take the original's memory meanwhile.

An accelerator's arrays are copied to the host by Orbax. On a CPU it reads them where they lie; a step to which they are donated would
then find them taken, and put the new state into fresh memory, which costs the system far more than this copy into the same each time.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gptjax.data import cores


class Aside:
  """Memory for one copy of a state; the next one is written over it."""

  def __init__(self) -> None:
    self._memory: dict[tuple[int, int], np.ndarray] = {}

  def copy(self, state: Any) -> Any:
    """The same values; those on CPUs in memory of their own, until the next call."""
    leaves, tree = jax.tree.flatten(state)
    parts = {(i, j): shard.data for i, leaf in enumerate(leaves) if _on_cpu(leaf) for j, shard in enumerate(leaf.addressable_shards)}
    with ThreadPoolExecutor(cores()) as pool:
      copies = dict(zip(parts, pool.map(self._copy, parts, parts.values())))
    for i in {i for i, _ in parts}:
      leaf = leaves[i]
      leaves[i] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [
        jax.device_put(copies[i, j], shard.data.sharding) for j, shard in enumerate(leaf.addressable_shards)])
    return jax.tree.unflatten(tree, leaves)

  def _copy(self, place: tuple[int, int], part: jax.Array) -> np.ndarray:
    values = np.asarray(part)
    if place not in self._memory:
      self._memory[place] = _aligned(values.shape, values.dtype)
    np.copyto(self._memory[place], values)
    return self._memory[place]


def _on_cpu(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and all(device.platform == 'cpu' for device in leaf.devices())


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Memory that JAX takes as it is, and does not copy once more: at a multiple of 64 bytes."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = np.empty(size + 64, np.uint8)
  begin = -raw.ctypes.data % 64
  return raw[begin:begin + size].view(dtype).reshape(shape)
