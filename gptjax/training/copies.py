"""Whether devices that should hold the same do: a digest of every array's part on every device, compared on the host."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.sharding import AXES


def copies_check(state: Any, mesh: Mesh) -> Callable[[Any], str]:
  """A function of a state: which devices do not hold what most others hold of an array, '' where all agree.

  Every single changed value changes its digest: values as integers are summed with odd weights, modulo 2^32. The state is read once
  and nothing of its size is allocated.

  Args:
    state: shapes and shardings of the states to come.
    mesh: where they lie.
  """
  paths = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in jax.tree.leaves_with_path(state)]
  specs = tuple(leaf.sharding.spec for leaf in jax.tree.leaves(state))

  def local(*parts):
    return jnp.stack([_digest(part) for part in parts])[None, None, None]

  @jax.jit
  def digests(state):
    every = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(*AXES, None), check_vma=False)
    return jax.reshard(every(*jax.tree.leaves(state)), PartitionSpec())

  def check(state: Any) -> str:
    found = np.asarray(digests(state))
    wrong = [f'{path} on {text}' for i, (path, spec) in enumerate(zip(paths, specs)) if (text := _deviating(found[..., i], spec, mesh))]
    more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
    return '; '.join(wrong[:3]) + more

  return check


def _digest(part: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(part, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[part.dtype.itemsize]).astype(jnp.uint32)
  weights = 1 + 2 * jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
  return jnp.sum(bits * weights, dtype=jnp.uint32)


def _deviating(digests: np.ndarray, spec: PartitionSpec, mesh: Mesh) -> str:
  """The devices whose digest [replica, data, model] of an array is not that of most copies of the same part."""
  split = {name for axes in spec if axes is not None for name in ((axes,) if isinstance(axes, str) else axes)}
  whole = [i for i, name in enumerate(AXES) if name not in split]
  grouped = lambda x: np.moveaxis(x, whole, range(3 - len(whole), 3)).reshape(-1, int(np.prod([x.shape[i] for i in whole])))
  wrong = []
  for values, devices in zip(grouped(digests), grouped(mesh.devices)):
    different, counts = np.unique(values, return_counts=True)
    if len(different) > 1:
      usual = different[counts.argmax()] if 2 * counts.max() > len(values) else None  # of two that differ either may err
      wrong += [device for value, device in zip(values, devices) if value != usual]
  return ', '.join(f'device {device.id} of process {device.process_index}' for device in wrong[:8])
