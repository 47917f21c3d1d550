"""Whether a state is fit to go on with: devices that should hold the same do, by a digest of every array's part on every device, which
are compared on the host; and what they hold is finite, since where ZeRO shares all out there is no copy that would differ."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.config import AXIS_NAMES

_FINITE = ('parameters/', 'optimizer/')
"""What must be; the variance of a loss may overflow."""


def replica_check(state: Any, mesh: Mesh) -> Callable[[Any], str]:
  """A function of a state: which devices do not hold what most others hold of an array, or what is not finite; '' where all is well.

  No good step leaves a parameter or a moment that is not finite, so a device or the memory did.

  Every single changed value changes its digest: values as integers are summed with odd weights, modulo 2^32. The state is read once
  and nothing of its size is allocated.

  Args:
    state: shapes and shardings of the states to come.
    mesh: where they lie.
  """
  return _state_check(tuple((jax.tree_util.keystr(path, simple=True, separator='/'), leaf.sharding.spec)
                            for path, leaf in jax.tree.leaves_with_path(state)), mesh)


@functools.lru_cache(maxsize=16)
def _state_check(leaves: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Callable[[Any], str]:
  """`leaves`: path and sharding of each array of the state."""
  paths, specs = zip(*leaves)

  digest = _digest if mesh.size > 1 else lambda part: jnp.uint32(0)  # of one device there is nothing to compare, and a CPU takes a while

  def local(*parts):
    finite = [_finite(part) if path.startswith(_FINITE) else jnp.uint32(1) for path, part in zip(paths, parts)]
    return jnp.stack([jnp.stack([digest(part) for part in parts]), jnp.stack(finite)])[(None,) * len(AXIS_NAMES)]

  @jax.jit
  def facts(state):
    every = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(*AXIS_NAMES, None, None), check_vma=False)
    return jax.reshard(every(*jax.tree.leaves(state)), PartitionSpec())

  def check(state: Any) -> str:
    digests, finite = np.moveaxis(np.asarray(facts(state)), -2, 0)
    differ = [(path, _deviating(digests[..., i], spec, mesh)) for i, (path, spec) in enumerate(zip(paths, specs))]
    infinite = [(path, _named(mesh.devices[finite[..., i] == 0])) for i, path in enumerate(paths)]
    return _listed('state', infinite, 'not finite') or _listed('copies', differ, 'differ')

  return check


def _finite(part: jax.Array) -> jax.Array:
  return jnp.all(jnp.isfinite(part)).astype(jnp.uint32)


def _digest(part: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(part, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[part.dtype.itemsize]).astype(jnp.uint32)
  weights = 1 + 2 * jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
  return jnp.sum(bits * weights, dtype=jnp.uint32)


def _deviating(digests: np.ndarray, spec: PartitionSpec, mesh: Mesh) -> str:
  """The devices whose digest (one per device of the mesh) of an array is not that of most copies of the same part."""
  split = {name for axes in spec if axes is not None for name in ((axes,) if isinstance(axes, str) else axes)}
  copied = [i for i, name in enumerate(AXIS_NAMES) if name not in split]
  grouped = lambda x: np.moveaxis(x, copied, range(x.ndim - len(copied), x.ndim)).reshape(-1, int(np.prod([x.shape[i] for i in copied])))
  wrong = []
  for values, devices in zip(grouped(digests), grouped(mesh.devices)):
    different, counts = np.unique(values, return_counts=True)
    if len(different) > 1:
      usual = different[counts.argmax()] if 2 * counts.max() > len(values) else None  # of two that differ either may err
      wrong += [device for value, device in zip(values, devices) if value != usual]
  return _named(wrong)


def _named(devices: Iterable[Any]) -> str:
  return ', '.join(f'device {device.id} of process {device.process_index}' for device in list(devices)[:8])


def _listed(what: str, found: list[tuple[str, str]], how: str) -> str:
  wrong = [f'{path} on {devices}' for path, devices in found if devices]
  more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
  return f'{what}: {"; ".join(wrong[:3])}{more} {how}' if wrong else ''
