"""One plan: memory, traffic and bounds of a config on a machine."""

import dataclasses

from gptjax.config import SLICE_AXES, Config, UserError, override
from gptjax.model import active_parameters, model_of, parameter_count
from gptjax.planning.collectives import Collective, collectives
from gptjax.planning.memory import Memory, analytic_memory
from gptjax.planning.program import Compiled, TooLarge, compile_step, durations, for_platform
from gptjax.planning.roofline import DAY, Roofline, roofline
from gptjax.planning.topology import Topology
from gptjax.planning.volumes import schedule_of, theoretical
from gptjax.sharding import abstract_mesh, check_sizes
from gptjax.training import check_unsharded


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A config on a machine, by the analytic model and, after `compile`, by the compiled program."""

  config: Config
  topology: Topology
  sizes: dict[str, int]
  """of the mesh axes"""
  parameters: int
  active: int
  """parameters that one token uses"""
  steps: int
  """of the run"""
  memory: Memory
  analytic: list[Collective]
  bounds: Roofline
  compiled: Compiled | None = None
  refusal: str = ''
  """the compiler's message if the program does not fit"""
  found: list[Collective] = dataclasses.field(default_factory=list)
  """collectives of the compiled program"""

  @property
  def needed(self) -> float:
    """Bytes per device, as counted by the compiler, or by the analytic model if nothing was compiled."""
    return self.compiled.total if self.compiled else self.memory.total

  @property
  def available(self) -> float:
    """Bytes that a program may use."""
    return self.topology.chip.memory * self.topology.chip.usable_fraction

  @property
  def fits(self) -> bool:
    """Whether a step fits the memory."""
    return not self.refusal and self.needed <= self.available

  @property
  def tokens(self) -> float:
    """Tokens of the run."""
    return self.steps * self.config.batch_size * self.config.data.context

  def days(self, seconds: float) -> float:
    """Duration of the run in days at a step time in seconds."""
    return self.steps * seconds / DAY

  def compile(self) -> 'Estimate':
    """The estimate with the actual train step compiled, whose collectives then set the bounds."""
    try:
      compiled = compile_step(self.config, self.topology)
    except TooLarge as error:
      return dataclasses.replace(self, refusal=str(error))
    schedule = schedule_of(self.config, self.sizes)
    share = schedule.microbatches * schedule.chunks / schedule.ticks if schedule.stages > 1 else 1.0
    found = collectives(compiled.text, self.topology.one_slice(self.sizes), share)
    if self.topology.slices > 1:  # only one slice was compiled: traffic between slices is analytic
      found += [one for one in self.analytic if {*one.axes} & {*SLICE_AXES}]
    bounds = roofline(self.config, self.topology, self.sizes, found, self.memory)
    return dataclasses.replace(self, compiled=compiled, found=found, bounds=bounds)


def estimate(config: Config, topology: Topology) -> Estimate:
  """The analytic part of a plan; takes about a second. Raises a UserError for a missing vocabulary size, a mesh that does not match the
  devices, sizes that it does not divide, attention that the devices cannot run, or a duration in epochs."""
  if not config.model.vocab_size:
    raise UserError('model.vocab_size', 0, 'the number of token ids: a plan reads no tokenizer')
  config = override(config, {'model.classes': config.model.classes or len(config.data.source.labels)})
  sizes = topology.mesh_sizes(config)
  mesh, context = abstract_mesh(sizes), config.data.context
  check_sizes(config, mesh)
  check_unsharded(model_of(config), config, mesh)
  memory = analytic_memory(for_platform(config, 'tpu' if topology.chip.is_tpu else 'gpu'), sizes)
  analytic = theoretical(config, sizes)
  return Estimate(config, topology, sizes, parameter_count(config.model, context), active_parameters(config.model, context),
                  durations(config)['steps'], memory, analytic, roofline(config, topology, sizes, analytic, memory))
