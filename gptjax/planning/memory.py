"""Bytes on one device, part by part: state from its real shards, activations from an abstract trace."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import use_abstract_mesh

from gptjax import config as configs
from gptjax.config import MATRIX_AXIS, ROW_AXES, STATE_AXIS, ComputeConfig, Config, ModelConfig, OptimizerConfig
from gptjax.model import abstract_model
from gptjax.model.head import CHUNK_BYTES, CHUNK_ROWS
from gptjax.planning.program import abstract_state, for_platform
from gptjax.planning.volumes import COMPUTE, elements
from gptjax.sharding import abstract_mesh

GATHERED_LAYERS = 2
"""Layers whose parameters stage 3 holds gathered: the one that runs, and the next on its way."""


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on one device."""

  parameters: float
  """float32, as they lie between steps"""
  optimizer: float
  gathered: float
  """parameters in the compute dtype: of the whole model at stages 1 and 2, of layers in use at stage 3"""
  gradients: float
  """float32; with microbatches their sum too"""
  activations: float
  """what the backward pass keeps from the forward pass, by the remat policy"""
  temporaries: float
  """what one layer makes anew in the backward pass, and the logits"""

  @property
  def state(self) -> float:
    """What stays from step to step."""
    return self.parameters + self.optimizer

  @property
  def total(self) -> float:
    """Everything."""
    return sum(dataclasses.astuple(self))


def analytic_memory(config: Config, sizes: dict[str, int]) -> Memory:
  """What a step should take on a mesh of these sizes. A compiler reuses and pads: its own count is the one to trust."""
  # What every kernel keeps is what splash attention keeps, and that can be traced where there is no accelerator.
  config = for_platform(configs.override(config, {'compute.attention': 'auto'}), 'tpu')
  stage, item = config.zero_stage, COMPUTE[config.compute.dtype][1]
  compute = ComputeConfig(scan=config.compute.scan, dtype=config.compute.dtype)  # what else it says does not change the state
  parameters, optimizer = _state(config.model, compute, config.data.context, config.optimizer, stage, tuple(sizes.items()))
  layers, rest, unsharded = elements(config, sizes)
  gathered = 0.0
  if parameters < 4 * (layers + rest + unsharded):
    in_use = (layers + rest) if stage < 3 else GATHERED_LAYERS * layers / config.model.layers + rest
    gathered = item * in_use
  gradients = 4 * (layers + rest + unsharded) if stage < 2 else 4 * ((layers + rest) / sizes[STATE_AXIS] + unsharded)
  rows = config.microbatch_size / math.prod(sizes[name] for name in ROW_AXES)
  tokens = rows * config.data.context
  one_layer = dataclasses.replace(config.model, layers=1)
  kept = dataclasses.replace(config.compute, remat='none', saved=(), offloaded=())
  # A chunk's logits in float32, and their gradient in the compute dtype.
  ids = config.model.table_rows / sizes[MATRIX_AXIS]
  logits = min(tokens, max(CHUNK_ROWS, CHUNK_BYTES // (4 * ids))) * ids * (4 + item)
  return Memory(
    parameters=parameters, optimizer=optimizer, gathered=gathered, gradients=gradients * (2 if config.microbatches > 1 else 1),
    activations=rows * row_bytes(config.model, config.compute, config.data.context, sizes[MATRIX_AXIS]),
    temporaries=rows * row_bytes(one_layer, kept, config.data.context, sizes[MATRIX_AXIS]) + logits)


@functools.cache
def _state(model: ModelConfig, compute: ComputeConfig, context: int, optimizer: OptimizerConfig, stage: int,
           sizes: tuple[tuple[str, int], ...]) -> tuple[int, int]:
  state = abstract_state(model, compute, context, optimizer, stage, dict(sizes))
  count = lambda tree: sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return count(state.parameters), count(state.optimizer)


@functools.cache
def row_bytes(config: ModelConfig, compute: ComputeConfig, context: int, model: int) -> float:
  """Bytes that a device keeps of one row from the forward to the backward pass, with `model` devices to a row.

  Read off the abstract trace of the layers on a mesh of that size, so it follows remat, sequence parallelism and attention as
  they are; what is not split over `model`, such as the residual stream, counts in full.
  """
  plan = abstract_model(config, compute, context)

  def kept(rows: int) -> int:
    tokens = jax.ShapeDtypeStruct((rows, context), jnp.int32)
    hidden = lambda weights, tokens: plan.merge(weights).hidden(tokens)[0]
    residuals = jax.eval_shape(lambda *inputs: jax.vjp(hidden, *inputs)[1], plan.shapes, tokens)
    shard = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return sum(math.prod(shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(residuals))

  with jax.set_mesh(None), use_abstract_mesh(abstract_mesh({MATRIX_AXIS: model})):
    return (kept(2 * model) - kept(model)) / model  # what does not grow with the rows is no activation: weights, masks
