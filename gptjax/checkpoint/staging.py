"""Host staging: a copy of the state that a save reads while the next step overwrites the original, for states on CPUs.

Orbax copies the arrays of accelerators to the host. On a CPU it reads them in place; a step that takes them over would then put the new
state into fresh memory, and mapping that costs far more than this copy into memory that is reused.
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
    copies = {key: self._memory_for(key, part) for key, part in parts.items()}
    with ThreadPoolExecutor(cores()) as pool:
      list(pool.map(lambda key: np.copyto(copies[key], np.asarray(parts[key])), parts))
    for i in {i for i, _ in parts}:
      leaf = leaves[i]
      leaves[i] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, [
        jax.device_put(copies[i, j], shard.data.sharding) for j, shard in enumerate(leaf.addressable_shards)])
    return jax.tree.unflatten(tree, leaves)

  def _memory_for(self, key: tuple[int, int], part: jax.Array) -> np.ndarray:
    if key not in self._memory:  # page-aligned, so that JAX uses it without copying it
      pages = mmap.mmap(-1, max(part.nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
      self._memory[key] = np.frombuffer(pages, np.uint8, part.nbytes).view(part.dtype).reshape(part.shape)
    return self._memory[key]


def _parts(leaves: list[Any]) -> dict[tuple[int, int], jax.Array]:
  """Returns this process's CPU shards by (leaf, shard)."""
  on_cpu = lambda leaf: isinstance(leaf, jax.Array) and all(device.platform == 'cpu' for device in leaf.devices())
  return {(i, j): shard.data for i, leaf in enumerate(leaves) if on_cpu(leaf) for j, shard in enumerate(leaf.addressable_shards)}
