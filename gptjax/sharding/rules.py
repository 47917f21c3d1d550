"""The one table from logical axes to mesh axes, and where ZeRO stores each parameter, its gradient and its optimizer state."""

import dataclasses
import math
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from gptjax.config import EXPERTS_AXIS, LAYERS_AXIS, STATE_AXIS, TENSOR_AXIS
from gptjax.sharding.mesh import AnyMesh

RULES: dict[str | None, str | None] = {
  'vocab': TENSOR_AXIS,
  'heads': TENSOR_AXIS,
  'kv_heads': TENSOR_AXIS,
  'mlp': TENSOR_AXIS,
  'embed': None,
  'head_width': None,
  'positions': None,
  'layers': LAYERS_AXIS,
  'experts': EXPERTS_AXIS,
  None: None,
}
"""The mesh axis that splits each logical axis of a parameter or an activation while the model computes; rows and tokens are local."""

Axis = str | tuple[str, int] | None
"""A logical axis by its name, or (name, parts) if it can be split only between parts: an axis of 2 heads of 64 features is ('kv_heads', 2).
If the size of the mesh axis does not divide the parts, or is 1, the axis stays unsharded."""


def spec(*axes: Axis, mesh: AnyMesh | None = None) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes while the model computes; `mesh`: default, the one in force."""
  def mesh_axis(axis: Axis) -> str | None:
    name, parts = axis if isinstance(axis, tuple) else (axis, 0)
    rule = RULES[name]
    size = 1 if rule is None else (mesh or jax.sharding.get_abstract_mesh()).shape.get(rule, 1)
    return None if size == 1 or parts % size else rule
  return PartitionSpec(*map(mesh_axis, axes))


def divisible(axis: str, parts: int) -> int:
  """The smallest multiple of `parts` that the mesh axis which splits a logical axis divides, in the mesh in force."""
  return math.lcm(parts, jax.sharding.get_abstract_mesh().shape.get(RULES[axis], 1))


_WHOLE = ('layers', 'experts')
"""Logical axes along which ZeRO shards nothing."""


class Shard(NamedTuple):
  """How ZeRO shards one parameter along one of its dimensions."""

  dim: int
  """negative: parameters of a scan have one more dimension in front"""
  parts: int
  """parts into which tensor parallelism has split this dimension before; 1: it has not"""


@dataclasses.dataclass(frozen=True)
class ParameterSpecs:
  """PartitionSpecs of a parameter, its gradient and its optimizer state."""

  compute: PartitionSpec
  """the parameter in a matrix product"""
  stored: PartitionSpec
  """the parameter between steps"""
  gradient: PartitionSpec
  """its gradient while microbatches add to it"""
  optimizer: PartitionSpec
  """its moments; the update runs with this sharding"""
  shard: Shard | None
  """the dimension that ZeRO shards where one of the specs above is sharded; None: nothing is"""


def parameter_specs(axes: tuple[Axis, ...], shape: tuple[int, ...], stage: int, converted: bool, mesh: AnyMesh) -> ParameterSpecs:
  """PartitionSpecs of a parameter at a ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 gradients too, 3 parameters too.

  `converted`: whether matrix products read the parameter in a dtype other than float32. Then the float32 original belongs to
  the optimizer state (arXiv:1910.02054, section 5), and stages 1 and 2 gather a converted copy of it once per step.
  """
  unsharded, shard = spec(*axes, mesh=mesh), _shard(axes, shape, mesh) if stage else None
  if shard is None:
    return ParameterSpecs(unsharded, unsharded, unsharded, unsharded, None)
  dim = len(shape) + shard.dim
  name = unsharded[dim]
  sharded = PartitionSpec(*unsharded[:dim], STATE_AXIS if name is None else (name, STATE_AXIS), *unsharded[dim + 1:])
  return ParameterSpecs(unsharded, stored=sharded if stage == 3 or converted else unsharded,
                        gradient=sharded if stage >= 2 else unsharded, optimizer=sharded, shard=shard)


def _shard(axes: tuple[Axis, ...], shape: tuple[int, ...], mesh: AnyMesh) -> Shard | None:
  """Shards the first dimension that ZeRO's axis divides, so that shards are contiguous. TPUs would pad shards of the last one to 128 lanes.

  Stacked layers and experts are not sharded along their own axis, since each step of a scan needs a complete layer or expert.
  """
  state = mesh.shape.get(STATE_AXIS, 1)
  if state == 1:
    return None
  for i, (axis, name) in enumerate(zip(axes, spec(*axes, mesh=mesh))):
    parts = 1 if name is None else mesh.shape[name]
    if axis not in _WHOLE and shape[i] % (state * parts) == 0:
      return Shard(i - len(shape), parts)
  return None


def unsharded_axes(axes: tuple[Axis, ...], shape: tuple[int, ...], stage: int, mesh: AnyMesh) -> dict[str, int]:
  """The mesh axes that should split a parameter and do not, each with the size that it does not divide."""
  found: dict[str, int] = {}
  for axis in axes:
    if isinstance(axis, tuple) and (rule := RULES[axis[0]]) is not None and axis[1] % mesh.shape[rule]:
      found[rule] = axis[1]
  if stage and mesh.shape[STATE_AXIS] > 1 and _shard(axes, shape, mesh) is None:
    found[STATE_AXIS] = max((size for axis, size in zip(axes, shape, strict=True) if axis not in _WHOLE), default=1)
  return found
