"""The search for the fastest layout: meshes, schedules, ZeRO stages, remat policies and numbers of microbatches, by the analytic model."""

import itertools
import math
from collections.abc import Iterator

from gptjax import config as configs
from gptjax.config import (
  BATCH_AXES, EXPERTS_AXIS, LAYERS_AXIS, REST_AXIS, SLICE_AXES, TENSOR_AXIS, TOKENS_AXIS, Config, UserError)
from gptjax.config.fields import Value
from gptjax.planning.estimate import Estimate, estimate
from gptjax.planning.topology import Topology

MAX_MODEL_AXIS = 64
"""Tensor parallelism beyond this makes matrices too narrow for the matrix units in any current model."""

MIN_TOKENS = 1024
"""Tokens of a row on each device that shares it: with fewer, exchanges of keys and values take longer than attention."""


def search(config: Config, topology: Topology) -> list[Estimate]:
  """All layouts that the config's batch allows; those that fit come first, sorted by `rank`. Raises a UserError for a config whose batch or
  model no layout divides."""
  found, refusals = [], []
  for values in candidates(config, topology):
    try:
      found.append(estimate(configs.override(config, values), topology))
    except UserError as error:
      refusals.append(error)
  if not found:
    raise next(iter(refusals), UserError('batch_size', config.batch_size, f'a row for each of the {topology.devices} devices of '
                                         f'{topology.name}, or for each mesh.{TENSOR_AXIS} of them, up to {MAX_MODEL_AXIS}'))
  return sorted(found, key=rank)


def rank(one: Estimate) -> tuple[bool, bool, float, float]:
  """Sort key of layouts, best first: the mean of the two bounds, between which actual steps lie; then the memory needed.

  Layouts that divide layers or tokens come last: where others fit, ZeRO has been faster than they are in all measurements that we know of,
  by more than the bounds show.
  """
  divided = one.sizes[LAYERS_AXIS] * one.sizes[TOKENS_AXIS] > 1
  return not one.fits, divided, (one.bounds.overlapped + one.bounds.sequential) / 2, one.needed


def candidates(config: Config, topology: Topology) -> Iterator[dict[str, Value]]:
  """Overrides of every layout to try, as dotted names; the batch does not change. Pipelines are tried with at least as many microbatches as
  stages and not at ZeRO stage 3, which would gather each layer for every microbatch."""
  policies = dict.fromkeys(('none', 'dots', 'full', config.compute.remat))
  tried = {
    SLICE_AXES[0]: [topology.slices] if topology.chip.is_tpu else sorted({1, topology.groups}),
    LAYERS_AXIS: [size for size in _divisors(topology.devices) if size <= config.model.layers],
    TOKENS_AXIS: [size for size in _divisors(topology.devices) if size == 1 or config.data.context % (MIN_TOKENS * size) == 0],
    EXPERTS_AXIS: [size for size in _divisors(topology.devices) if size == 1 or config.model.experts and config.model.experts % size == 0],
    TENSOR_AXIS: _divisors(min(topology.devices, MAX_MODEL_AXIS))}
  for sizes in (dict(zip(tried, found)) for found in itertools.product(*tried.values())):
    rest, pipe = topology.devices // math.prod(sizes.values()), sizes[LAYERS_AXIS]
    sizes[REST_AXIS] = rest
    groups = math.prod(sizes[name] for name in BATCH_AXES)
    if math.prod(sizes.values()) != topology.devices or groups > config.batch_size:
      continue
    rows = config.batch_size // groups  # per device, without microbatches
    stages = range(4 if pipe == 1 else 3) if rest > 1 else [0]  # ZeRO has nothing to shard over a single device
    schedules = [('1F1B', 1)] if pipe == 1 else [('1F1B', 1), ('ZBH1', 1)] + [('Interleaved1F1B', 2)] * (2 * pipe <= config.model.layers)
    for parts, stage, policy, (schedule, chunks) in itertools.product(_divisors(rows), stages, policies, schedules):
      if parts < pipe > 1:
        continue
      named = {} if policy == 'names' else {'compute.saved': (), 'compute.offloaded': ()}
      yield {f'mesh.{name}': size for name, size in sizes.items()} | {
        'pipeline.schedule': schedule, 'pipeline.chunks': chunks, 'zero_stage': stage, 'compute.remat': policy,
        'microbatches': parts} | named


def settings(one: Estimate) -> dict[str, Value]:
  """The settings in which layouts differ, by their names in a config."""
  flat = configs.flatten(one.config)
  pipeline = ('pipeline.schedule', 'pipeline.chunks') if one.sizes[LAYERS_AXIS] > 1 else ()
  names = (*pipeline, 'zero_stage', 'compute.remat', 'microbatches')
  return {f'mesh.{name}': size for name, size in one.sizes.items()} | {name: flat[name] for name in names}


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]
