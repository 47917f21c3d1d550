"""Machines by name: 'v5p:4x4x4' is a slice of TPUs, 'v5p:4x4x4*2' two of them, 'h100:8x16' sixteen nodes of eight GPUs."""

import dataclasses
import itertools
import math
import re
from typing import NamedTuple

from gptjax.config import TENSOR_AXIS, REST_AXIS, SLICE_AXES, STATE_AXIS, Config, UserError
from gptjax.sharding import mesh_sizes
from gptjax.sharding.chips import CHIPS, Chip

EXAMPLES = {
  2: '1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16',
  3: '2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8, 8x8x16, 8x16x16, 16x16x16',
}
"""Slice shapes that Google Cloud lists, by the number of axes of the torus."""


class Link(NamedTuple):
  """The network between the devices of a mesh axis."""

  network: str
  bandwidth: float
  """bytes/s that a device can send along the axis"""


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices and the networks between them."""

  name: str
  chip: Chip
  shape: tuple[int, ...]
  """TPU: chips along each axis of the torus; GPU: (GPUs per node, nodes)"""
  slices: int = 1
  """TPU slices, connected by the data-centre network"""

  @property
  def chips(self) -> int:
    """Number of chips."""
    return math.prod(self.shape) * self.slices

  @property
  def devices(self) -> int:
    """Number of devices as JAX counts them."""
    return self.chips * self.chip.per_chip

  @property
  def groups(self) -> int:
    """Number of slices or nodes."""
    return self.slices if self.chip.is_tpu else self.shape[1]

  def mesh_sizes(self, config: Config) -> dict[str, int]:
    """Sizes of the mesh axes on all devices, from the slowest network to the fastest. Raises a UserError for a mesh that does not match the
    devices."""
    sizes = mesh_sizes(config.mesh, self.devices)
    if math.prod(sizes.values()) != self.devices:
      rest = self.devices * sizes[REST_AXIS] // math.prod(sizes.values())
      raise UserError(f'mesh.{REST_AXIS}', sizes[REST_AXIS], f'-1 or {rest} on the {self.devices} devices of {self.name}')
    if self.chip.is_tpu and math.prod(sizes[name] for name in SLICE_AXES) % self.slices:
      raise UserError(f'mesh.{SLICE_AXES[0]}', sizes[SLICE_AXES[0]], f'a multiple of the {self.slices} slices of {self.name}')
    return sizes

  def one_slice(self, sizes: dict[str, int]) -> dict[str, int]:
    """Sizes of the mesh within one slice."""
    left, inner = self.slices, dict(sizes)
    for name in SLICE_AXES:
      between = math.gcd(inner[name], left)
      inner[name] //= between
      left //= between
    return inner

  def links(self, sizes: dict[str, int]) -> dict[str, Link]:
    """The link of each mesh axis.

    On a torus a mesh axis has the rings of the torus axes it covers; a closed ring sends in both directions at the same time. On GPUs
    an axis within a node has NVLink; one that spans nodes has the network, with the ports of all its GPUs in a node.
    """
    return self._torus(sizes) if self.chip.is_tpu else self._switched(sizes)

  def _torus(self, sizes: dict[str, int]) -> dict[str, Link]:
    ring = lambda size: self.chip.link * (2 if size % self.chip.wraps == 0 else 1)
    free = [size for size in self.shape if size > 1]
    wanted = max(sizes[TENSOR_AXIS] // self.chip.per_chip, 1)
    exact = next((picked for n in range(len(free) + 1) for picked in itertools.combinations(free, n) if math.prod(picked) == wanted), None)
    model = data = 0.0
    if exact is not None:
      for size in exact:
        free.remove(size)
        model += ring(size)
    else:  # part of an axis, whose rest belongs to the data axis: neither has a closed ring
      for size in sorted(free):
        if wanted > 1 and (size % wanted == 0 or wanted % size == 0):
          free.remove(size)
          model += ring(size) if wanted % size == 0 else self.chip.link
          data += 0.0 if wanted % size == 0 else self.chip.link
          wanted = 1 if size % wanted == 0 else wanted // size
    data += sum(map(ring, free))
    # Other axes have other links of the torus.
    ici = lambda axis: Link(f'ICI ({axis})', (model if axis == TENSOR_AXIS else data) or self.chip.link)
    across = Link('data-centre network', self.chip.network) if self.slices > 1 else ici(STATE_AXIS)
    return {axis: across if axis in SLICE_AXES else ici(axis) for axis in sizes}

  def _switched(self, sizes: dict[str, int]) -> dict[str, Link]:
    node, inner = self.shape[0], 1
    links: dict[str, Link] = {}
    for axis, size in reversed(sizes.items()):
      ports = min(size, max(node // inner, 1))  # GPUs of the axis in one node
      inner *= size
      network = Link('InfiniBand', min(self.chip.link, ports * self.chip.network))
      links[axis] = Link('NVLink', self.chip.link) if inner <= node else network
    return links


def parse(text: str | None) -> Topology:
  """The machine with a name CHIP:SIZExSIZE..., for several TPU slices followed by *SLICES. Raises a UserError for an unknown chip or an
  unavailable shape."""
  match = re.fullmatch(r'([\w-]+):([1-9]\d*(?:x[1-9]\d*)*)(?:\*([1-9]\d*))?', text or '')
  if not match:
    raise UserError('--topology', text, "CHIP:SHAPE, such as 'v5p:4x4x4' (a slice of TPUs), 'v5p:4x4x4*2' (two slices), 'h100:8x16' (16 "
                    'nodes of 8 GPUs)')
  name, shape, slices = match[1], tuple(map(int, match[2].split('x'))), int(match[3] or 1)
  if name not in CHIPS:
    raise UserError('--topology', text, f'one of {", ".join(CHIPS)} before the colon', {key: f'{key}:{match[2]}' for key in CHIPS}, name)
  chip = CHIPS[name]
  if not chip.is_tpu:
    if len(shape) > 2 or slices > 1:
      raise UserError('--topology', text, f"GPUs per node, then nodes, such as '{name}:8' or '{name}:8x16'")
    return Topology(text or '', chip, (*shape, 1)[:2])
  hosts = len(shape) == chip.axes and shape[0] % 2 == shape[1] % 2 == 0  # of 2 x 2 chips
  if not (hosts or shape == (1, 1) == (1,) * chip.axes) or math.prod(shape) > chip.pod:
    raise UserError('--topology', text, f'{chip.axes} sizes after {name}:, the first two even, at most {chip.pod} chips: '
                    f'{EXAMPLES[chip.axes]}')
  return Topology(text or '', chip, shape, slices)
