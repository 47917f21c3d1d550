"""Lower bounds of the step time, and the resource that sets them: the time that each resource needs for its part."""

import dataclasses

from gptjax.config import Config
from gptjax.model import attention_flops, flops_per_token, parameter_count, repeated_weights
from gptjax.planning.collectives import Collective
from gptjax.planning.memory import Memory
from gptjax.planning.topology import Topology
from gptjax.planning.volumes import COMPUTE, elements, schedule_of

DAY = 86_400
USUAL_MFU = 0.4
"""Of published runs: PaLM 46 % on TPU v4 (arXiv:2204.02311), Llama 3 405B 38 to 43 % on H100 (arXiv:2407.21783), nanoGPT's 124 million
parameters 28 % on A100 (4 days on 8 of them)."""


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Lower bounds of one step, in seconds."""

  flops: float
  """FLOPs of a step per device, as needed: causal attention, nothing recomputed"""
  executed: float
  """FLOPs including those that remat recomputes"""
  seconds: dict[str, float]
  """time that each resource is busy: compute (with the bubble of a pipeline), memory, and each network that is used"""
  peak: float
  """FLOP/s of a device"""

  @property
  def overlapped(self) -> float:
    """Step time if all resources work at the same time: no program is faster."""
    return max(self.seconds.values())

  @property
  def sequential(self) -> float:
    """Step time if each resource waits for the others; actual steps lie in between."""
    return sum(self.seconds.values())

  @property
  def usual(self) -> float:
    """Step time at the MFU that published runs reach, and no less than the lower bound."""
    return max(self.overlapped, self.flops / (USUAL_MFU * self.peak))

  @property
  def bottleneck(self) -> str:
    """The resource that the overlapped bound waits for."""
    return max(self.seconds, key=lambda name: self.seconds[name])

  def mfu(self, seconds: float) -> float:
    """The needed FLOPs as a fraction of the peak, at a step time in seconds."""
    return self.flops / (seconds * self.peak)


def roofline(config: Config, topology: Topology, sizes: dict[str, int], moved: list[Collective], memory: Memory) -> Roofline:
  """Bounds of a step whose collectives are `moved`."""
  chip, tokens = topology.chip, config.batch_size * config.data.context / topology.devices
  flops = flops_per_token(config.model, config.data.context)
  needed, executed = tokens * flops, tokens * (flops + _recomputed(config))
  busy = 1 - schedule_of(config, sizes).bubble
  seconds = {'compute': executed / chip.flops / busy, 'memory': _touched(config, sizes, memory) / chip.hbm}
  links = topology.links(sizes)
  for one in moved:
    if one.axes:
      link = min((links[axis] for axis in one.axes), key=lambda link: link.bandwidth)
      seconds[link.network] = seconds.get(link.network, 0.0) + one.total / link.bandwidth
  return Roofline(needed, executed, seconds, chip.flops)


def _recomputed(config: Config) -> float:
  """FLOPs per token that the backward pass repeats: attention, which every policy but 'none' repeats, and products with weights."""
  if config.compute.remat == 'none':
    return 0.0
  return attention_flops(config.model, config.data.context) + 2 * repeated_weights(config.model, config.compute)


def _touched(config: Config, sizes: dict[str, int], memory: Memory) -> float:
  """Bytes that must pass through a device's memory in a step; a lower bound, since products also spill activations.

  Each microbatch reads the parameters in the compute dtype twice (three times where a product is repeated), writes gradients, and
  writes and reads activations; the update reads parameters, moments and gradients and writes parameters and moments.
  """
  local = sum(elements(config, sizes))
  item = COMPUTE[config.compute.dtype][1]
  passes = 2 + repeated_weights(config.model, config.compute) / parameter_count(config.model, config.data.context)
  each = passes * item * local + 4 * local + 2 * memory.activations
  return config.microbatches * each + 2 * memory.state + memory.parameters
