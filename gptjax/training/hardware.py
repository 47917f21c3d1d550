"""Peak FLOP/s of the devices, and a count of compilations."""

import time

import jax
import jax.numpy as jnp

from gptjax.sharding.chips import CHIPS

PEAK_FLOPS = {kind: chip.flops for chip in CHIPS.values() for kind in chip.kinds}
"""Dense bfloat16 FLOP/s of one device by the prefix of its kind, from the vendors' data sheets."""


def peak_flops(devices: list[jax.Device], dtype: str) -> tuple[float, str]:
  """Returns the total FLOP/s of all devices, the denominator of MFU, and the source of the figure.

  For devices in the table this is the data sheet's bfloat16 figure regardless of `dtype`; for others a square matrix product is timed
  (once for all virtual CPU devices, which share one machine).
  """
  kind = devices[0].device_kind
  known = max((name for name in PEAK_FLOPS if kind.startswith(name)), key=len, default=None)
  if known:
    return PEAK_FLOPS[known] * len(devices), f'{known} bfloat16 data sheet'
  size, times = 2048, []
  mine = [device for device in devices if device.process_index == jax.process_index()]
  with jax.set_mesh(jax.make_mesh((1,), ('device',), devices=mine[:1])):  # the mesh of the run has the devices of all processes
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    for _ in range(5):
      start = time.perf_counter()
      product(x, x).block_until_ready()
      times.append(time.perf_counter() - start)
  count = 1 if devices[0].platform == 'cpu' else len(devices)
  return 2 * size**3 / min(times) * count, f'measured {size} x {size} {dtype} matrix product'


class CompileCounter:
  """Counts the programs that XLA compiles or loads from the persistent cache, until `close`."""

  def __init__(self):
    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._count)

  def _count(self, event: str, duration_secs: float, **_: str | int) -> None:
    self.count += event == '/jax/core/compile/backend_compile_duration'

  def close(self) -> None:
    """Stops counting."""
    jax.monitoring.unregister_event_duration_listener(self._count)
