"""A copy of the state for the writer, on CPUs, so that the next step may take the original's memory meanwhile.

An accelerator's arrays are copied to the host by Orbax. On a CPU it reads them where they lie; a step to which they are donated would
then find them taken, and put the new state into fresh memory, which costs the system far more than this copy into the same each time.
"""

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gptjax.data import cores


class HostStaging:
  """Memory for one copy of a state; the next one is written over it."""

  def __init__(self) -> None:
    self._memory: dict[tuple[int, int], np.ndarray] = {}

  def reserve(self, state: Any) -> Callable[[], None]:
    """Has memory for such a state; what is returned makes the system hand it over, which takes a while, and ends before `copy`."""
    memories = [self._memory_for(place, part) for place, part in _parts(jax.tree.leaves(state)).items()]

    def touch() -> None:
      for memory in memories:
        memory.fill(0)
    return touch

  def copy(self, state: Any) -> Any:
    """The same values; those on CPUs in memory of their own, until the next call."""
    leaves, tree = jax.tree.flatten(state)
    parts = _parts(leaves)
    with ThreadPoolExecutor(cores()) as pool:
      copies = dict(zip(parts, pool.map(self._copy, parts, parts.values())))
    for i in {i for i, _ in parts}:
      leaf = leaves[i]
      leaves[i] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [
        jax.device_put(copies[i, j], shard.data.sharding) for j, shard in enumerate(leaf.addressable_shards)])
    return jax.tree.unflatten(tree, leaves)

  def _copy(self, place: tuple[int, int], part: jax.Array) -> np.ndarray:
    memory = self._memory_for(place, part)
    np.copyto(memory, np.asarray(part))
    return memory

  def _memory_for(self, place: tuple[int, int], part: jax.Array) -> np.ndarray:
    if place not in self._memory:
      self._memory[place] = _pages(part.shape, part.dtype)
    return self._memory[place]


def _parts(leaves: list[Any]) -> dict[tuple[int, int], jax.Array]:
  """What this process holds on CPUs, by leaf and shard."""
  return {(i, j): shard.data for i, leaf in enumerate(leaves) if _on_cpu(leaf) for j, shard in enumerate(leaf.addressable_shards)}


def _on_cpu(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and all(device.platform == 'cpu' for device in leaf.devices())


def _pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Memory that begins with a page: JAX takes it as it is, and does not copy it once more."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(raw, np.uint8, size).view(dtype).reshape(shape)
