"""The one place where plans touch the train step: its abstract state, and the compiled program."""

import dataclasses
import os
import time
from collections.abc import Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, use_abstract_mesh

from gptjax import config as configs
from gptjax.config import ComputeConfig, Config, ModelConfig, OptimizerConfig, UserError, duration_in_steps
from gptjax.model import abstract_model, attention_backend
from gptjax.planning.topology import Topology
from gptjax.sharding import ROWS, abstract_mesh, make_mesh
from gptjax.training import TrainState, abstract, initializer, make_objective, make_optimizer, schedule, train_step


class TooLarge(Exception):
  """The program needs more memory than the chip has; the text is the compiler's."""


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of the train step on one device. Sizes in bytes."""

  text: str
  """the optimized program"""
  arguments: int
  """state and batch"""
  temporaries: int
  """the most that is alive at once beside them, in the chip's memory"""
  outputs: int
  """results that do not take the place of arguments"""
  code: int
  seconds: float
  """that tracing and compiling took"""

  @property
  def total(self) -> int:
    """Memory taken."""
    return self.arguments + self.temporaries + self.outputs + self.code


def needs_libtpu() -> str | None:
  """What to install before a program can be compiled for TPUs; None: nothing."""
  return None if find_spec('libtpu') else 'libtpu is not installed: pip install -r requirements-tpu.txt compiles the program too'


def for_platform(config: Config, platform: str) -> Config:
  """The config as the accelerator resolves it: here 'auto' would ask this process, which has a CPU."""
  return configs.override(config, {'compute.attention': attention_backend(config.model, config.compute, config.data.context, platform)})


def steps(config: Config) -> int:
  """Steps of the run.

  Raises:
    UserError: a duration in epochs, which only the data could tell.
  """
  for field, value in (('steps', config.steps), ('optimizer.warmup', config.optimizer.warmup), ('optimizer.decay', config.optimizer.decay)):
    if 'epoch' in str(value).lower():
      raise UserError(field, value, "steps or tokens, as '300e9 tokens': a plan reads no data, and so knows no epochs")
  return _durations(config)['steps']


def _durations(config: Config) -> dict[str, int]:
  sizes = {'batch_size': config.batch_size, 'context': config.data.context, 'rows_per_epoch': config.batch_size}
  fields = {'steps': config.steps, 'warmup': config.optimizer.warmup, 'decay': config.optimizer.decay}
  return {name: duration_in_steps(name if name == 'steps' else f'optimizer.{name}', value, **sizes) for name, value in fields.items()}


def abstract_state(model: ModelConfig, compute: ComputeConfig, context: int, optimizer: OptimizerConfig, zero_stage: int,
                   sizes: dict[str, int]) -> TrainState:
  """Shapes, dtypes and shardings of the train state on a mesh of these sizes."""
  mesh = abstract_mesh(sizes)
  durations = {'steps': 2, 'warmup': 1, 'decay': 1}  # shapes do not depend on them
  with jax.set_mesh(None), use_abstract_mesh(mesh):
    return abstract(initializer(abstract_model(model, compute, context), make_optimizer(optimizer, **durations), zero_stage, mesh, 0), mesh)


def compile_step(config: Config, topology: Topology, options: Mapping[str, str | bool] = MappingProxyType({})) -> Compiled:
  """Compiles the real train step for TPUs that need not be there.

  Of several slices one is compiled, with its share of the batch: libtpu compiles no more without the slices' own network.

  Args:
    config: the run.
    topology: TPUs, with as many chips as the mesh has devices.
    options: of the compiler, as 'xla_dump_to'.

  Raises:
    TooLarge: it does not fit the chip.
    UserError: libtpu refuses the topology.
  """
  start = time.perf_counter()
  sizes = topology.one_slice(topology.mesh_sizes(config))
  config = configs.override(config, {f'mesh.{name}': size for name, size in sizes.items()} | {
    'batch_size': config.batch_size // topology.slices})
  mesh = make_mesh(config.mesh, _devices(topology))
  compiled = compile_on(mesh, for_platform(config, 'tpu'), options)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and text is not None
  arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
  # temp_size_in_bytes would count more than the compiler assigns to temporaries in the chip's memory: half as much again was seen.
  temporaries = memory.peak_memory_in_bytes - arguments - outputs
  return Compiled(text, arguments, temporaries, outputs, memory.generated_code_size_in_bytes, time.perf_counter() - start)


def _devices(topology: Topology) -> list[jax.Device]:
  # No chip is used: another process may have libtpu loaded, and it need not look for a host's name and kind, and complain.
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
    raise UserError('--topology', topology.name, f'a shape that libtpu knows; it says: {error}') from None


def compile_on(mesh: Mesh, config: Config, options: Mapping[str, str | bool] = MappingProxyType({})) -> jax.stages.Compiled:
  """Compiles the real train step for a mesh of devices; raises TooLarge."""
  durations = _durations(config)
  with jax.set_mesh(mesh):
    model = abstract_model(config.model, config.compute, config.data.context)
    optimizer = make_optimizer(config.optimizer, **durations)
    state = abstract(initializer(model, optimizer, config.zero_stage, mesh, config.seed), mesh)
    step: Any = train_step(model, make_objective(config), optimizer, schedule(config.optimizer, config.optimizer.peak_lr, **durations),
                           zero_stage=config.zero_stage, mesh=mesh, microbatches=config.microbatches, seed=config.seed)
    rows = NamedSharding(mesh, ROWS)
    array = lambda dtype: jax.ShapeDtypeStruct((config.batch_size, config.data.context), dtype, sharding=rows)
    batch = {name: array(jnp.float32 if name == 'mask' else jnp.int32) for name in _batch_fields(config)}
    try:
      return step.lower(state, batch).compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise TooLarge(str(error).removeprefix('RESOURCE_EXHAUSTED: ').partition('\n')[0]) from None


def _batch_fields(config: Config) -> list[str]:
  isolated = ['positions', 'segments'] if config.data.isolate_documents else []
  return ['tokens', 'targets', 'mask', *isolated]
