"""The replica check: every device's shard of every array is hashed, and the hashes of replicas are compared on the host.

Values are also checked to be finite, since arrays that ZeRO shards completely have no replica to compare with.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.config import AXIS_NAMES

_FINITE = ('trained/', 'frozen/', 'optimizer/')
"""Arrays that must be finite; the running variance of the loss may overflow."""


def replica_check(state: Any, mesh: Mesh) -> Callable[[Any], str]:
  """Returns a function of states like an abstract one that names devices whose shard differs from most of its replicas, or is not finite.

  It returns '' for a healthy state. No good step produces parameters or moments that are not finite, so they are a hardware fault too.
  The digest is a sum of the bits with odd weights modulo 2^32, which every change of a single value changes. The state is read once,
  and nothing of its size is allocated.
  """
  return _cached_check(tuple((jax.tree_util.keystr(path, simple=True, separator='/'), leaf.sharding.spec)
                            for path, leaf in jax.tree.leaves_with_path(state)), mesh)


@functools.lru_cache(maxsize=16)
def _cached_check(leaves: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Callable[[Any], str]:
  """`leaves`: path and sharding of each array of the state."""
  paths, specs = zip(*leaves)
  digest = _digest if mesh.size > 1 else lambda part: jnp.uint32(0)  # one device has no replicas, and hashing takes time

  def local(*parts):
    finite = [jnp.all(jnp.isfinite(part)).astype(jnp.uint32) if path.startswith(_FINITE) else jnp.uint32(1)
              for path, part in zip(paths, parts)]
    return jnp.stack([jnp.stack([digest(part) for part in parts]), jnp.stack(finite)])[(None,) * len(AXIS_NAMES)]

  @jax.jit
  def facts(state):
    every = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(*AXIS_NAMES, None, None), check_vma=False)
    return jax.reshard(every(*jax.tree.leaves(state)), PartitionSpec())

  def check(state: Any) -> str:
    digests, finite = np.moveaxis(np.asarray(facts(state)), -2, 0)
    differ = [(path, _deviating(digests[..., i], spec, mesh)) for i, (path, spec) in enumerate(zip(paths, specs))]
    infinite = [(path, _named(mesh.devices[finite[..., i] == 0])) for i, path in enumerate(paths)]
    return _listed('state', infinite, 'not finite') or _listed('replicas', differ, 'differ')

  return check


def _digest(part: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(part, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[part.dtype.itemsize]).astype(jnp.uint32)
  weights = 1 + 2 * jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
  return jnp.sum(bits * weights, dtype=jnp.uint32)


def _deviating(digests: np.ndarray, spec: PartitionSpec, mesh: Mesh) -> str:
  """Returns the devices whose digest (one per device of the mesh) of an array differs from most replicas of the same shard."""
  split = {name for axes in spec if axes is not None for name in ((axes,) if isinstance(axes, str) else axes)}
  replicated = [i for i, name in enumerate(AXIS_NAMES) if name not in split]
  count = int(np.prod([mesh.devices.shape[i] for i in replicated]))
  grouped = lambda x: np.moveaxis(x, replicated, range(x.ndim - len(replicated), x.ndim)).reshape(-1, count)
  wrong = []
  for values, devices in zip(grouped(digests), grouped(mesh.devices)):
    different, counts = np.unique(values, return_counts=True)
    if len(different) > 1:
      usual = different[counts.argmax()] if 2 * counts.max() > len(values) else None  # with two replicas either may be wrong
      wrong += [device for value, device in zip(values, devices) if value != usual]
  return _named(wrong)


def _named(devices: Iterable[Any]) -> str:
  return ', '.join(f'device {device.id} of process {device.process_index}' for device in list(devices)[:8])


def _listed(what: str, found: list[tuple[str, str]], how: str) -> str:
  wrong = [f'{path} on {devices}' for path, devices in found if devices]
  more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
  return f'{what}: {"; ".join(wrong[:3])}{more} {how}' if wrong else ''
