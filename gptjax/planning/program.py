"""The train step compiled for absent TPUs."""

import dataclasses
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from gptjax import config as configs
from gptjax.config import Config, UserError, duration_in_steps, schedule_warning
from gptjax.model import attention_backend, expert_backend, model_of
from gptjax.planning.topology import Topology
from gptjax.sharding import TOKENS_SPEC, make_mesh
from gptjax.training import abstract, frozen_names, initializer, learning_rates, make_objective, make_optimizer, train_step


class TooLarge(Exception):
  """The program needs more memory than the chip has; the text is the compiler's."""


@dataclasses.dataclass(frozen=True)
class Compiled:
  """The compiled train step and its memory on one device, in bytes."""

  text: str
  """the optimized program"""
  arguments: int
  """state and batch"""
  temporaries: int
  """peak of what is live at once besides the arguments, in the chip's memory"""
  outputs: int
  """results that do not reuse the memory of arguments"""
  code: int
  seconds: float
  """duration of tracing and compiling"""

  @property
  def total(self) -> int:
    """Memory in total."""
    return self.arguments + self.temporaries + self.outputs + self.code


def for_platform(config: Config, platform: str) -> Config:
  """The config with attention and experts 'auto' resolved for an accelerator, since this process has only a CPU."""
  return configs.override(config, {
    'compute.attention': attention_backend(config.model, config.compute, config.data.context, platform),
    'compute.experts': expert_backend(config.compute, platform)})


def durations(config: Config) -> dict[str, int]:
  """The steps of the run, of its warmup and of its decay. Raises a UserError for a duration in epochs, which depend on the data."""
  found = {}
  for field, value in (('steps', config.steps), ('optimizer.warmup', config.optimizer.warmup), ('optimizer.decay', config.optimizer.decay)):
    if 'epoch' in str(value).lower():
      raise UserError(field, value, "steps or tokens, such as '300e9 tokens': a plan reads no data, so the length of an epoch is unknown")
    found[field.removeprefix('optimizer.')] = duration_in_steps(
      field, value, batch_size=config.batch_size, context=config.data.context, rows_per_epoch=config.batch_size)
  schedule_warning(config.optimizer, **found)  # raises the errors; the rate itself does not matter to a plan
  return found


def compile_step(config: Config, topology: Topology, options: dict[str, str | bool] | None = None) -> Compiled:
  """Compiles the actual train step for absent TPUs.

  Of several slices only one is compiled, with its part of the batch: libtpu needs the slices' own network for more. `options` are those
  of the compiler, such as 'xla_dump_to'. Raises TooLarge if it does not fit the chip, and a UserError if libtpu refuses the topology.
  """
  start = time.perf_counter()
  sizes = topology.one_slice(topology.mesh_sizes(config))
  config = configs.override(config, {f'mesh.{name}': size for name, size in sizes.items()} | {
    'batch_size': config.batch_size // topology.slices})
  compiled = compile_on(make_mesh(config.mesh, _devices(topology)), for_platform(config, 'tpu'), options)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and text is not None
  arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
  # temp_size_in_bytes can be half as much again as the temporaries that the compiler places in the chip's memory.
  temporaries = memory.peak_memory_in_bytes - arguments - outputs
  return Compiled(text, arguments, temporaries, outputs, memory.generated_code_size_in_bytes, time.perf_counter() - start)


def _devices(topology: Topology) -> list[jax.Device]:
  # No chip is used: other processes may have loaded libtpu, and a search for the host's name and type would print errors.
  for name, value in (('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'), ('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_WORKER_ID', '0'),
                      ('TPU_ACCELERATOR_TYPE', 'v5p-8')):
    os.environ.setdefault(name, value)
  options: dict[str, Any] = {}
  if topology.name.startswith('v4:'):
    options['chip_config_name'] = 'megacore'  # a chip is one device, as in training; libtpu's default is two
  if topology.chips == topology.slices:
    options['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return list(topologies.get_topology_desc(topology.name.partition('*')[0], 'tpu', **options).devices)
  except jax.errors.JaxRuntimeError as error:
    raise UserError('--topology', topology.name, f'a shape that libtpu supports; it reports: {error}') from None


def compile_on(mesh: Mesh, config: Config, options: dict[str, str | bool] | None = None) -> jax.stages.Compiled:
  """Compiles the actual train step for a mesh of devices; raises TooLarge."""
  steps = durations(config)
  with jax.set_mesh(mesh):
    model = model_of(config)
    optimizer = make_optimizer(config.optimizer, config.model.width_ratio)
    state = abstract(initializer(model, optimizer, config.zero_stage, mesh, config.seed, frozen_names(model, config)), mesh)
    step: Any = train_step(model, make_objective(config), optimizer, learning_rates(config.optimizer, **steps),
                           zero_stage=config.zero_stage, mesh=mesh, microbatches=config.microbatches, seed=config.seed,
                           pipeline=config.pipeline, gradient_noise=config.gradient_noise)
    isolated = ['positions', 'segments'] if config.data.isolate_documents else []
    array = lambda dtype: jax.ShapeDtypeStruct((config.batch_size, config.data.context), dtype, sharding=NamedSharding(mesh, TOKENS_SPEC))
    batch = {name: array(jnp.int32) for name in ('tokens', 'targets', *isolated)} | {'mask': array(jnp.float32)}
    try:
      return step.lower(state, batch).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise TooLarge(str(error).removeprefix('RESOURCE_EXHAUSTED: ').partition('\n')[0]) from None
