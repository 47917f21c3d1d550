"""What a step has to send by theory: data parallelism by ZeRO stage, tensor parallelism as Megatron's.

arXiv:1910.02054, section 7, counts what ZeRO moves, arXiv:1909.08053, section 3, the all-reduces of a layer split over
`model`, and arXiv:2205.05198, section 4, the pairs that replace them where activations are split along the sequence too.
Where the compiled program sends more than this, something is moved that need not be.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from gptjax.config import Config, ModelConfig
from gptjax.model import abstract_model
from gptjax.planning.collectives import Collective
from gptjax.planning.program import abstract_mesh

COMPUTE = {'float32': ('f32', 4), 'bfloat16': ('bf16', 2)}
"""XLA's name and the bytes of a compute dtype."""


class Elements(NamedTuple):
  """Elements of the parameters on one device while the model computes: split over `model`, whole over `data`."""

  layers: int
  """of blocks, that ZeRO shares out over `data`"""
  rest: int
  """of embeddings and head, that ZeRO shares out"""
  whole: int
  """of parameters too small to share"""

  @property
  def all(self) -> int:
    """Elements in all."""
    return sum(self)


def elements(config: Config, sizes: dict[str, int]) -> Elements:
  """Counts the parameters of one device."""
  return _elements(dataclasses.replace(config.model, remat='none'), config.data.context, tuple(sizes.items()))


@functools.cache
def _elements(model: ModelConfig, context: int, axes: tuple[tuple[str, int], ...]) -> Elements:
  sizes = dict(axes)
  mesh = abstract_mesh(sizes)
  plan = abstract_model(model, context)
  compute, stored = plan.shardings(0, mesh), plan.shardings(3, mesh)
  counts = [0, 0, 0]
  for name, shape in plan.shapes.items():
    kind = 2 if compute[name] == stored[name] and sizes['data'] > 1 else 0 if name.startswith('blocks/') else 1
    counts[kind] += math.prod(compute[name].shard_shape(shape.shape))
  return Elements(*counts)


def theoretical(config: Config, sizes: dict[str, int]) -> list[Collective]:
  """The collectives of a step on a mesh of these sizes; gradients are reduced in float32, all else in the compute dtype.

  Gradients of layers are reduced where the backward pass makes them, with every microbatch. Those of embedding and head are made
  outside the loop over layers, and stages 0 and 1, which keep all of them, can leave their sum to the end of the step. Over
  `replica` each device reduces the part that it holds once `data` has been reduced.
  """
  found = [*_data_parallel(config, sizes), *_tensor_parallel(config, sizes)]
  return [one for one in found if one.group > 1 and one.payload]


def _data_parallel(config: Config, sizes: dict[str, int]) -> list[Collective]:
  stage, parts = config.zero_stage, config.microbatches
  dtype, item = COMPUTE[config.compute.dtype]
  layers, rest, whole = elements(config, sizes)
  d, r = sizes['data'], sizes['replica']
  data = lambda kind, dtype, payload, trips, why: Collective(kind, dtype, payload, d, ('data',), trips, why)
  if stage < 2:
    found = [data('all-reduce', 'f32', 4 * (layers + whole), parts, 'gradients of layers'),
             data('reduce-scatter' if stage else 'all-reduce', 'f32', 4 * rest, 1, 'gradients of embedding and head')]
  else:
    found = [data('reduce-scatter', 'f32', 4 * (layers + rest), parts, 'gradients'),
             data('all-reduce', 'f32', 4 * whole, parts, 'gradients of small parameters')]
  if stage in (1, 2):
    found.append(data('all-gather', dtype, item * (layers + rest), 1, 'updated parameters'))
  if stage == 3:
    found += [data('all-gather', dtype, item * layers, 2 * parts, 'layers, forward and backward'),
              data('all-gather', dtype, item * rest, parts, 'embedding and head')]
  mine = (layers + rest) / d + whole
  return [*found, Collective('all-reduce', 'f32', 4 * mine, r, ('replica',), parts, 'gradients')]


def _tensor_parallel(config: Config, sizes: dict[str, int]) -> list[Collective]:
  p, layers, parts = sizes['model'], config.model.layers, config.microbatches
  dtype, item = COMPUTE[config.compute.dtype]
  tokens = config.microbatch_size * config.data.context / (sizes['replica'] * sizes['data'])
  stream = item * tokens * config.model.width
  model = lambda kind, dtype, payload, trips, why: Collective(kind, dtype, payload, p, ('model',), trips * parts, why)
  again = config.compute.remat == 'full'  # the backward pass runs attention's sum again; the feed-forward's it does not need
  found = [model('all-reduce', 'f32', 4 * tokens, 3, 'largest logit, normalizer and target of the loss')]
  if config.compute.sequence_parallel:
    # Inputs are kept in parts, and so gathered again for the gradients of the weights.
    return [*found,
            model('all-gather', dtype, stream, layers * 6 + 2, 'inputs of attention, feed-forward and head, forward and backward'),
            model('reduce-scatter', dtype, stream, layers * (5 if again else 4) + 2, 'their sums, forward and backward')]
  return [*found, model('all-reduce', dtype, stream, layers * (5 if again else 4), 'attention and feed-forward, forward and backward'),
          model('all-reduce', dtype, stream, 2, 'embedding forward, head backward')]


def by_axis(found: list[Collective]) -> dict[str, float]:
  """Bytes a device sends in a step along each mesh axis; what crosses several counts on the slowest, which is the first."""
  sums: dict[str, float] = {}
  for one in found:
    if one.axes:
      sums[one.axes[0]] = sums.get(one.axes[0], 0.0) + one.total
  return sums
