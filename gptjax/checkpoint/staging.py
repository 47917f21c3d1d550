"""Host staging: a copy of the state that a save reads while the next step overwrites the original, for states on CPUs.

Orbax copies the arrays of accelerators to the host. On a CPU it reads them in place; a step to which they are donated would then have
to put the new state into fresh memory, and mapping that costs far more than this copy into memory that is reused.
"""

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from gptjax.data import cores


class HostStaging:
  """Reusable memory for one copy of a state."""

  def __init__(self) -> None:
    self._memory: dict[tuple[int, int], np.ndarray] = {}

  def reserve(self, state: Any) -> Callable[[], None]:
    """Allocates memory for such a state, and returns a function that makes the system map it, which takes a while."""
    memories = [self._memory_for(key, part) for key, part in _parts(jax.tree.leaves(state)).items()]

    def touch() -> None:
      for memory in memories:
        memory.fill(0)
    return touch

  def copy(self, state: Any) -> Any:
    """Returns the state with its CPU arrays copied into this memory, where they are valid until the next call."""
    leaves, tree = jax.tree.flatten(state)
    parts = _parts(leaves)
    with ThreadPoolExecutor(cores()) as pool:
      copies = dict(zip(parts, pool.map(self._copy, parts, parts.values())))
    for i in {i for i, _ in parts}:
      leaf = leaves[i]
      leaves[i] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [
        jax.device_put(copies[i, j], shard.data.sharding) for j, shard in enumerate(leaf.addressable_shards)])
    return jax.tree.unflatten(tree, leaves)

  def _copy(self, key: tuple[int, int], part: jax.Array) -> np.ndarray:
    memory = self._memory_for(key, part)
    np.copyto(memory, np.asarray(part))
    return memory

  def _memory_for(self, key: tuple[int, int], part: jax.Array) -> np.ndarray:
    if key not in self._memory:
      self._memory[key] = _pages(part.shape, part.dtype)
    return self._memory[key]


def _parts(leaves: list[Any]) -> dict[tuple[int, int], jax.Array]:
  """Returns this process's CPU shards by (leaf, shard)."""
  return {(i, j): shard.data for i, leaf in enumerate(leaves) if _on_cpu(leaf) for j, shard in enumerate(leaf.addressable_shards)}


def _on_cpu(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and all(device.platform == 'cpu' for device in leaf.devices())


def _pages(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Allocates page-aligned memory, which JAX uses without copying it."""
  size = int(np.prod(shape)) * dtype.itemsize
  raw = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  return np.frombuffer(raw, np.uint8, size).view(dtype).reshape(shape)
