"""How fast a step can be at best, and what holds it back: the time that each resource needs for its part."""

import dataclasses
import functools

from gptjax.config import Config
from gptjax.model import flops_per_token
from gptjax.planning.collectives import Collective
from gptjax.planning.memory import Memory
from gptjax.planning.topology import Topology
from gptjax.planning.volumes import COMPUTE, elements

DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Lower bounds of one step, in seconds."""

  flops: float
  """FLOPs of a step on each device, as needed: causal attention, nothing recomputed"""
  executed: float
  """FLOPs with what remat computes again"""
  seconds: dict[str, float]
  """what each resource is busy for: compute, memory, and each network that is used"""
  peak: float
  """FLOP/s of a device"""

  @property
  def overlapped(self) -> float:
    """Step time if all resources work at once: no program is faster."""
    return max(self.seconds.values())

  @property
  def sequential(self) -> float:
    """Step time if each waits for the others; real steps lie in between."""
    return sum(self.seconds.values())

  @property
  def binds(self) -> str:
    """The resource that the overlapped bound waits for."""
    return max(self.seconds, key=lambda name: self.seconds[name])

  def mfu(self, seconds: float) -> float:
    """Share of the peak that the needed FLOPs are, at this step time."""
    return self.flops / (seconds * self.peak)


def roofline(config: Config, topology: Topology, sizes: dict[str, int], moved: list[Collective], memory: Memory) -> Roofline:
  """Bounds of a step whose collectives are `moved`."""
  chip, tokens = topology.chip, config.batch_size * config.data.context / topology.devices
  needed = tokens * _flops(config)
  executed = needed + tokens * _recomputed(config)
  seconds = {'compute': executed / chip.flops, 'memory': _touched(config, sizes, memory) / chip.hbm}
  links = topology.links(sizes)
  for one in moved:
    if one.axes:
      link = min((links[axis] for axis in one.axes), key=lambda link: link.bandwidth)
      seconds[link.network] = seconds.get(link.network, 0.0) + one.total / link.bandwidth
  return Roofline(needed, executed, seconds, chip.flops)


def _recomputed(config: Config) -> float:
  """FLOPs a token that the backward pass does again: of the forward pass all (full), or attention's products alone (dots).

  The output head is not recomputed. A third of all FLOPs is the forward pass.
  """
  if config.compute.remat == 'none':
    return 0.0
  attention = 4 * config.model.layers * config.model.width * (config.data.context + 1) / 2
  if config.compute.remat != 'full':
    return attention
  head = 2 * config.model.width * config.model.table_rows
  return _flops(config) / 3 - head


def _flops(config: Config) -> float:
  return _flops_per_token(config.model, config.data.context)


_flops_per_token = functools.cache(flops_per_token)  # a search asks again and again


def _touched(config: Config, sizes: dict[str, int], memory: Memory) -> float:
  """Bytes that must pass through a device's memory in a step; a bound from below, since products also spill activations.

  Each microbatch reads the parameters in the compute dtype twice (thrice where the forward pass runs again), writes gradients and
  writes and reads activations; the update reads parameters, moments and gradients and writes the first two.
  """
  local = elements(config, sizes).all
  item = COMPUTE[config.compute.dtype][1]
  passes = 3 if config.compute.remat == 'full' else 2
  each = passes * item * local + 4 * local + 2 * memory.activations
  return config.microbatches * each + 2 * memory.state + memory.parameters
