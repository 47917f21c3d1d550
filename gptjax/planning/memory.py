"""Bytes per device, part by part: state from its actual shards, activations from an abstract trace."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import use_abstract_mesh

from gptjax import config as configs
from gptjax.config import (
  BATCH_AXES, EXPERTS_AXIS, LAYERS_AXIS, STATE_AXIS, TENSOR_AXIS, TOKENS_AXIS, ComputeConfig, Config, LoraConfig, ModelConfig,
  OptimizerConfig)
from gptjax.model import Slots, abstract_model, slots_of
from gptjax.model.head import CHUNK_BYTES, CHUNK_ROWS
from gptjax.planning.program import for_platform
from gptjax.planning.volumes import COMPUTE, elements, schedule_of
from gptjax.sharding import abstract_mesh
from gptjax.training import make_optimizer, state_bytes

GATHERED_LAYERS = 2
"""Layers whose parameters stage 3 holds gathered: the one that runs, and the next one, which is being gathered."""
TRACED = 1024
"""Tokens of a row whose activations are counted, instead of those of a longer one."""


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes per device."""

  parameters: float
  """float32, as stored between steps"""
  optimizer: float
  gathered: float
  """parameters in the compute dtype: of the complete model at stages 1 and 2, of the layers in use at stage 3"""
  gradients: float
  """float32; with microbatches their sum too"""
  activations: float
  """those that the backward pass keeps from the forward pass, according to the remat policy"""
  temporaries: float
  """intermediate values of one layer in the backward pass, and the logits"""

  @property
  def state(self) -> float:
    """Memory that stays allocated from step to step."""
    return self.parameters + self.optimizer

  @property
  def total(self) -> float:
    """Sum of all parts."""
    return sum(dataclasses.astuple(self))


def analytic_memory(config: Config, sizes: dict[str, int]) -> Memory:
  """Estimates the memory of a step on a mesh of these sizes. Compilers reuse and pad memory: a compiled program's count is exact."""
  rows, tokens = config.microbatch_size / math.prod(sizes[name] for name in BATCH_AXES), config.data.context // sizes[TOKENS_AXIS]
  if config.compute.attention not in ('blocks', 'xla'):
    # Every kernel keeps the same activations as splash attention, which is traced without an accelerator; so do devices that share rows.
    shared = configs.override(config, {'compute.attention': 'auto', 'data.context': tokens})
    config = dataclasses.replace(config, compute=for_platform(shared, 'tpu').compute)
  stage, context, item = config.zero_stage, config.data.context, COMPUTE[config.compute.dtype][1]
  compute = ComputeConfig(scan=config.compute.scan, dtype=config.compute.dtype)  # other settings do not change the state
  state = _state_bytes(config.model, compute, context, slots_of(config), config.optimizer, config.frozen, config.lora, stage,
                       tuple(sizes.items()))
  gathered = float(state.get('gathered', 0))
  if stage == 3 and sizes[STATE_AXIS] > 1:
    layers, experts, rest, _ = elements(config, sizes)
    gathered = item * (GATHERED_LAYERS * (layers + experts) * sizes[LAYERS_AXIS] / config.model.layers + rest)
  model = _with_room(config.model, sizes[EXPERTS_AXIS])
  one_layer = dataclasses.replace(model, layers=1)
  kept = dataclasses.replace(config.compute, remat='none', saved=(), offloaded=())
  # The logits of a chunk in float32, and their gradient in the compute dtype.
  ids = config.model.outputs / sizes[TENSOR_AXIS]
  logits = min(rows * tokens, max(CHUNK_ROWS, CHUNK_BYTES // (4 * ids))) * ids * (4 + item)
  return Memory(
    parameters=state['parameters'], optimizer=state['optimizer'], gathered=gathered,
    gradients=state['gradients'] * (2 if config.microbatches > 1 else 1),
    activations=rows * kept_parts(config, sizes) * row_bytes(
      model, dataclasses.replace(config.compute, offloaded=()), tokens, sizes[TENSOR_AXIS]),
    temporaries=rows * row_bytes(one_layer, kept, tokens, sizes[TENSOR_AXIS]) + logits)


def _with_room(model: ModelConfig, devices: int) -> ModelConfig:
  """A model whose rows keep on one device what those of `model` keep where `devices` share the experts: a device has room for the tokens of
  all of them, since all may choose its experts (gptjax/model/dispatch.py)."""
  count = model.experts_per_token * devices
  return dataclasses.replace(model, experts_per_token=count, experts=max(model.experts, count)) if model.experts and devices > 1 else model


def kept_parts(config: Config, sizes: dict[str, int]) -> float:
  """How many times the activations of a microbatch in all layers a stage keeps at most; those of W count as those of F and B."""
  schedule = schedule_of(config, sizes)
  return schedule.peak / (schedule.stages * schedule.chunks) if schedule.stages > 1 else 1.0


@functools.cache
def _state_bytes(model: ModelConfig, compute: ComputeConfig, context: int, slots: Slots, optimizer: OptimizerConfig,
                 frozen: tuple[str, ...], lora: LoraConfig, stage: int, sizes: tuple[tuple[str, int], ...]) -> dict[str, int]:
  mesh = abstract_mesh(dict(sizes))
  with jax.set_mesh(None), use_abstract_mesh(mesh):
    described = abstract_model(model, compute, context, slots, lora)
    transformation = make_optimizer(optimizer, model.width_ratio)
    return state_bytes(described, transformation, stage, mesh, described.frozen(frozen))


@functools.cache
def row_bytes(config: ModelConfig, compute: ComputeConfig, context: int, model: int) -> float:
  """Bytes that a device keeps of one row from the forward to the backward pass, with `model` devices per row.

  They are counted in the abstract trace of the layers on a mesh of that size, so they follow remat, sequence parallelism and attention;
  arrays that are not split over `model`, such as the residual stream, count in full. With splash attention, all of them grow in
  proportion to the tokens, and a part of the row is traced: its trace looks at every block of the square.
  """
  if compute.attention == 'splash' and context > TRACED and context % TRACED == 0:
    return row_bytes(config, compute, TRACED, model) * (context // TRACED)
  # Ragged products keep the same arrays, and cannot be traced outside of the step's shard_map.
  described = abstract_model(config, dataclasses.replace(compute, experts='blocks'), context)

  def kept(rows: int) -> int:
    tokens = jax.ShapeDtypeStruct((rows, context), jnp.int32)
    hidden = lambda weights, tokens: described.merge(weights).hidden(tokens)[0]
    residuals = jax.eval_shape(lambda *inputs: jax.vjp(hidden, *inputs)[1], described.shapes, tokens)
    shard = lambda x: x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return sum(math.prod(shard(x)) * x.dtype.itemsize for x in jax.tree.leaves(residuals))

  with jax.set_mesh(None), use_abstract_mesh(abstract_mesh({TENSOR_AXIS: model})):
    return (kept(2 * model) - kept(model)) / model  # arrays that do not grow with the rows are not activations: weights, masks
