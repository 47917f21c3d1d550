"""The speed and memory of each accelerator, from the vendors' data sheets: the one table for MFU and for the plan of a run."""

import dataclasses

import jax

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX counts them. Bandwidths are in bytes/s, of sending."""

  kinds: tuple[str, ...]
  """starts of JAX's device_kind"""
  flops: float
  """dense bfloat16 FLOP/s"""
  memory: float
  """bytes"""
  usable_fraction: float
  """share of the memory that a program may take: libtpu keeps 0.25 of a v5e's 16 GiB; JAX's default on GPUs is 0.9 or less"""
  hbm: float
  """bandwidth of the memory"""
  link: float
  """TPU: one ICI link, of two on each axis of the torus; GPU: all of its NVLinks"""
  network: float
  """a device's share of the network between slices or nodes: data-centre network, InfiniBand"""
  axes: int = 0
  """axes of the torus; 0: GPUs behind a switch"""
  wraps: int = 1
  """an axis of the torus closes to a ring where its size is a multiple of this"""
  pod: int = 0
  """maximum number of chips of a slice"""
  per_chip: int = 1
  """devices per chip"""

  @property
  def is_tpu(self) -> bool:
    """Whether devices form a torus, and libtpu compiles for them."""
    return self.axes > 0


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. ICI is given there as bytes/s of all links, both ways: a link
# one way is that over 2 * 2 * axes. The network is per chip (v5p 50 Gb/s), or that of a pod over its chips (v5e 6.4 Tb/s,
# v6e 25.6 Tb/s); v4's and 7x's are not in the tables, and are taken as v5p's and v6e's. When rings close: the same pages.
# GPUs: NVIDIA's data sheets of the SXM boards, NVLink both ways halved; the network is that of DGX nodes, one HDR (A100) or NDR
# port per GPU. Of memory: A100 and H100 report 80 GiB; H200 and B200 are counted as on the sheet.
CHIPS = {
  'v4': Chip(('TPU v4',), 275e12, 32 * GIB, 0.98, 1228e9, 50e9, 6.25e9, axes=3, wraps=4, pod=4096),
  'v5e': Chip(('TPU v5 lite', 'TPU v5e'), 197e12, 16 * GIB, 0.98, 819e9, 50e9, 3.125e9, axes=2, wraps=16, pod=256),
  'v5p': Chip(('TPU v5', 'TPU v5p'), 459e12, 95 * GIB, 0.98, 2765e9, 100e9, 6.25e9, axes=3, wraps=4, pod=8960),
  'v6e': Chip(('TPU v6 lite', 'TPU v6e'), 918e12, 32 * GIB, 0.98, 1638e9, 100e9, 12.5e9, axes=2, wraps=16, pod=256),
  # Its chips are two devices each, and share their links between them.
  'tpu7x': Chip(('TPU7x',), 2307e12 / 2, 96 * GIB, 0.98, 7380e9 / 2, 50e9, 6.25e9, axes=3, wraps=4, pod=9216, per_chip=2),
  'a100': Chip(('NVIDIA A100',), 312e12, 80 * GIB, 0.9, 2039e9, 300e9, 25e9),
  'h100': Chip(('NVIDIA H100',), 989e12, 80 * GIB, 0.9, 3350e9, 450e9, 50e9),
  'h200': Chip(('NVIDIA H200',), 989e12, 141e9, 0.9, 4800e9, 450e9, 50e9),
  'b200': Chip(('NVIDIA B200',), 2250e12, 180e9, 0.9, 8000e9, 900e9, 50e9),
}


def peak_flops(devices: list[jax.Device]) -> tuple[float, str] | None:
  """The total bfloat16 FLOP/s of all devices by the table, the denominator of MFU, and the source of the figure.

  None for devices that are not in the table, such as CPUs: what a timed matrix product reaches depends on what else the machine does.
  """
  kind = devices[0].device_kind
  known = [(name, chip.flops) for chip in CHIPS.values() for name in chip.kinds if kind.startswith(name)]
  if not known:
    return None
  name, flops = max(known, key=lambda pair: len(pair[0]))
  return flops * len(devices), f'{name} bfloat16 data sheet'
