"""The analytic model of the bytes that a step must send: those of ZeRO for data parallelism, those of Megatron for tensor parallelism, and
keys and values for context parallelism.

arXiv:1910.02054, section 7, counts the traffic of ZeRO, arXiv:1909.08053, section 3, the all-reduces of a layer split over
`model`, and arXiv:2205.05198, section 4, the pairs of collectives that replace them if activations are split along the sequence too.
A compiled program that sends more makes unnecessary transfers.
"""

import functools
import math
from typing import NamedTuple

from gptjax.config import (
  BATCH_AXES, EXPERTS_AXIS, LAYERS_AXIS, LOCAL_AXES, STATE_AXIS, TENSOR_AXIS, TOKENS_AXIS, ComputeConfig, Config, LoraConfig,
  ModelConfig, PipelineConfig)
from gptjax.model import Slots, abstract_model, exchanges, repeated_products, slots_of
from gptjax.planning.collectives import Collective, totals
from gptjax.sharding import Schedule, abstract_mesh, make_schedule

COMPUTE = {'float32': ('f32', 4), 'bfloat16': ('bf16', 2)}
"""XLA's name and the bytes of a compute dtype."""


class Elements(NamedTuple):
  """Elements of the parameters on one device while the model computes: split over `model`, complete over `data`."""

  layers: int
  """of blocks, that ZeRO shards"""
  experts: int
  """the same of experts, which mesh.expert splits too"""
  rest: int
  """of embeddings and head, that ZeRO shards"""
  unsharded: int
  """of parameters too small to shard"""


def elements(config: Config, sizes: dict[str, int], trained: bool = False) -> Elements:
  """Counts the parameters of one device, or those that are trained."""
  frozen, lora = (config.frozen, config.lora) if trained else ((), LoraConfig())
  return _elements(config.model, config.compute.scan, config.data.context, slots_of(config), frozen, lora, tuple(sizes.items()))


@functools.cache
def _elements(model: ModelConfig, scan: bool, context: int, slots: Slots, frozen: tuple[str, ...], lora: LoraConfig,
              axes: tuple[tuple[str, int], ...]) -> Elements:
  mesh = abstract_mesh(dict(axes))
  described = abstract_model(model, ComputeConfig(scan=scan), context, slots, lora)
  unsharded, stored = described.shardings(0, mesh), described.shardings(3, mesh)
  counts = [0, 0, 0, 0]
  for name in described.shapes.keys() - described.frozen(frozen):
    shape = described.shapes[name]
    block = 'experts' if 'experts' in described.axes[name] else 'layers' if name.startswith('blocks/') else 'rest'
    small = unsharded[name] == stored[name] and mesh.shape[STATE_AXIS] > 1
    kind = Elements._fields.index('unsharded' if small else block)
    counts[kind] += math.prod(unsharded[name].shard_shape(shape.shape))
  return Elements(*counts)


def theoretical(config: Config, sizes: dict[str, int]) -> list[Collective]:
  """The collectives of a step on a mesh of these sizes; gradients are reduced in float32, other arrays in the compute dtype.

  Stages 0 and 1 reduce gradients once per step, stages 2 and 3 with every microbatch, where the backward pass makes them. Along the
  other axes that divide rows, each device reduces once per step the part that it holds.
  """
  found = [*_data_parallel(config, sizes), *_tensor_parallel(config, sizes), *_pipeline(config, sizes), *_context_parallel(config, sizes),
           *_expert_parallel(config, sizes)]
  return [one for one in found if one.group > 1 and one.payload]


def device_tokens(config: Config, sizes: dict[str, int]) -> float:
  """Tokens of a microbatch on one device."""
  return config.microbatch_size * config.data.context / math.prod(sizes[name] for name in (*BATCH_AXES, TOKENS_AXIS))


def _data_parallel(config: Config, sizes: dict[str, int]) -> list[Collective]:
  stage, parts = config.zero_stage, config.microbatches
  dtype, item = COMPUTE[config.compute.dtype]
  layers, experts, rest, unsharded = elements(config, sizes, trained=True)
  every = tuple(name for name in LOCAL_AXES if sizes[name] > 1)  # all devices have the embedding, the head and the last norm
  without = lambda *axes: tuple(name for name in every if name not in axes)
  def along(axes, kind, dtype, payload, trips, why):
    return Collective(kind, dtype, payload, math.prod(sizes[name] for name in axes), axes, trips, why)
  data = lambda *facts: along((STATE_AXIS,), *facts)
  small = along(every, 'all-reduce', 'f32', 4 * unsharded, 1, 'gradients of small parameters')
  if stage == 0:
    return [along(without(LAYERS_AXIS), 'all-reduce', 'f32', 4 * layers, 1, 'gradients'), small,
            along(without(LAYERS_AXIS, EXPERTS_AXIS), 'all-reduce', 'f32', 4 * experts, 1, 'gradients of experts'),
            along(every, 'all-reduce', 'f32', 4 * rest, 1, 'gradients')]
  shard = 4 / sizes[STATE_AXIS]
  found = [data('reduce-scatter', 'f32', 4 * (layers + experts + rest), parts if stage > 1 else 1, 'gradients'), small,
           along(without(LAYERS_AXIS, STATE_AXIS), 'all-reduce', 'f32', shard * layers, 1, 'gradients'),
           along(without(LAYERS_AXIS, STATE_AXIS, EXPERTS_AXIS), 'all-reduce', 'f32', shard * experts, 1, 'gradients of experts'),
           along(without(STATE_AXIS), 'all-reduce', 'f32', shard * rest, 1, 'gradients')]
  layers, experts, rest, _ = elements(config, sizes)
  if stage < 3:
    return [*found, data('all-gather', dtype, item * (layers + experts + rest), 1, 'updated parameters')]
  return [*found, data('all-gather', dtype, item * (layers + experts), 2 * parts, 'layers, forward and backward'),
          data('all-gather', dtype, item * rest, parts, 'embedding and head')]


def _tensor_parallel(config: Config, sizes: dict[str, int]) -> list[Collective]:
  p, layers, microbatches = sizes[TENSOR_AXIS], -(-config.model.layers // sizes[LAYERS_AXIS]), config.microbatches
  dtype, item = COMPUTE[config.compute.dtype]
  tokens = device_tokens(config, sizes)
  stream = item * tokens * config.model.width
  def model(kind, dtype, payload, trips, why, group=p):
    return Collective(kind, dtype, payload, group, (TENSOR_AXIS,), trips * microbatches, why)
  sums = 4 + len({'out', 'down'} & repeated_products(config.model, config.compute))
  found = [model('all-reduce', 'f32', 4 * tokens, 3, 'largest logit, normalizer and target of the loss')]
  if (parts := math.gcd(p, config.model.key_heads)) < p:  # devices whose queries read the same keys add up their gradients
    keys = 2 * item * tokens * config.model.key_heads * config.model.head_width
    found += [model('all-reduce', dtype, keys / parts, layers, 'gradients of keys and values', p // parts),
              model('all-gather', dtype, keys, layers, 'gradients of keys and values', parts)]
  if config.compute.sequence_parallel:
    # Inputs are kept in parts, so they are gathered again for the gradients of the weights.
    return [*found,
            model('all-gather', dtype, stream, layers * 6 + 2, 'inputs of attention, feed-forward and head, forward and backward'),
            model('reduce-scatter', dtype, stream, layers * sums + 2, 'their sums, forward and backward')]
  return [*found, model('all-reduce', dtype, stream, layers * sums, 'attention and feed-forward, forward and backward'),
          model('all-reduce', dtype, stream, 2, 'embedding forward, head backward')]


def _pipeline(config: Config, sizes: dict[str, int]) -> list[Collective]:
  if (stages := sizes[LAYERS_AXIS]) == 1:
    return []
  dtype, item = COMPUTE[config.compute.dtype]
  stream = item * device_tokens(config, sizes) * config.model.width / (sizes[TENSOR_AXIS] if config.compute.sequence_parallel else 1)
  ticks = schedule_of(config, sizes).ticks
  return [Collective('collective-permute', dtype, stream, stages, (LAYERS_AXIS,), 2 * ticks, 'activations and gradients, at every tick')]


@functools.cache
def _schedule(pipeline: PipelineConfig, stages: int, microbatches: int) -> Schedule:
  return make_schedule(pipeline.schedule, stages, microbatches, pipeline.chunks)


def schedule_of(config: Config, sizes: dict[str, int]) -> Schedule:
  """The schedule of a step on a mesh of these sizes; with one stage it has no idle ticks."""
  return _schedule(config.pipeline, sizes[LAYERS_AXIS], config.microbatches)


def _context_parallel(config: Config, sizes: dict[str, int]) -> list[Collective]:
  """Keys and values of all devices visit each one, forward and backward; the gradients of keys and values go back, from hop to hop in the
  ring. Where remat repeats the forward pass, the two passes then share a gather, or the ring's first hop."""
  n, model, tokens = sizes[TOKENS_AXIS], config.model, device_tokens(config, sizes)
  dtype, item = COMPUTE[config.compute.dtype]
  heads = math.lcm(model.key_heads, sizes[TENSOR_AXIS]) / sizes[TENSOR_AXIS]  # on each device, repeated where `model` does not divide them
  layers = -(-model.layers // sizes[LAYERS_AXIS])
  keys, segments = 2 * tokens * heads * model.head_width, 4 * tokens if config.data.isolate_documents else 0
  def context(kind, dtype, payload, trips, why):
    return Collective(kind, dtype, payload, n, (TOKENS_AXIS,), trips * layers * config.microbatches, why)
  if config.compute.context_attention == 'all_gather':
    return [context('all-gather', dtype, n * item * keys, 2, 'keys and values, forward and backward'),
            context('all-gather', 's32', n * segments, 2, 'segments'),
            context('reduce-scatter', 'f32', n * 4 * keys, 1, 'gradients of keys and values')]
  hops = 2 * (n - 1) + (0 if config.compute.remat == 'none' else n - 2)
  return [context('collective-permute', dtype, item * keys, hops, 'keys and values, forward and backward'),
          context('collective-permute', 's32', segments, hops, 'segments'),
          context('collective-permute', 'f32', 4 * keys, n - 1, 'gradients of keys and values'),
          context('collective-permute', dtype, item * keys, 1, 'their sums, to the owner')]


def _expert_parallel(config: Config, sizes: dict[str, int]) -> list[Collective]:
  """Tokens on their way to the experts of other devices and back, as gptjax/model/dispatch.py sends them on accelerators."""
  model, p = config.model, sizes[EXPERTS_AXIS]
  dtype, item = COMPUTE[config.compute.dtype]
  tokens = device_tokens(config, sizes)
  layers = -(-sum(map(model.has_experts, range(model.layers))) // sizes[LAYERS_AXIS])
  def expert(kind, dtype, payload, trips, why):
    return Collective(kind, dtype, payload, p, (EXPERTS_AXIS,), trips * layers * config.microbatches, why)
  chosen = tokens * model.experts_per_token
  if exchanges(p, model.experts_per_token):
    return [expert('ragged-all-to-all', dtype, item * chosen * model.width, 5, 'tokens to experts and back, forward and backward'),
            expert('ragged-all-to-all', 'f32', 4 * chosen, 3, 'weights of experts, and their gradients')]
  return [expert('all-gather', dtype, item * p * tokens * model.width, 3, 'tokens to experts, forward and backward; gradients'),
          expert('reduce-scatter', dtype, item * p * tokens * model.width, 2, 'results of experts; gradients'),
          expert('all-gather', 'f32', 4 * p * chosen, 2, 'weights of experts'),
          expert('all-gather', 's32', 4 * p * chosen, 2, 'chosen experts'),
          expert('reduce-scatter', 'f32', 4 * p * chosen, 1, 'gradients of the weights of experts')]


def by_axis(found: list[Collective]) -> dict[str, float]:
  """Bytes that a device sends per step along each mesh axis; a collective over several counts on the slowest, which is the first."""
  return totals((one for one in found if one.axes), lambda one: one.axes[0])
