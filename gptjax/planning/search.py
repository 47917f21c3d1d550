"""Which layout is fastest: every mesh, ZeRO stage, remat policy and count of microbatches, by the analytic model."""

import itertools
from collections.abc import Iterator

from gptjax import config as configs
from gptjax.config import MATRIX_AXIS, REST_AXIS, SLICE_AXES, Config, UserError
from gptjax.config.fields import Value
from gptjax.planning.estimate import Estimate, estimate
from gptjax.planning.topology import Topology

STAGES = (0, 1, 2, 3)
LARGEST_MODEL = 64
"""Tensor parallelism beyond this leaves matrices too narrow for a matrix unit in any model of today."""


def search(config: Config, topology: Topology) -> list[Estimate]:
  """All layouts that the config's batch allows, those that fit first, the fastest first.

  The rank is the mean of the overlapped and the sequential bound, since real steps lie between the two; of equals the one with
  more memory to spare comes first.

  Raises:
    UserError: no layout divides batch and model.
  """
  found, refusals = [], []
  for values in candidates(config, topology):
    try:
      found.append(estimate(configs.override(config, values), topology))
    except UserError as error:
      refusals.append(error)
  if not found:
    raise next(iter(refusals), UserError('batch_size', config.batch_size, f'a row for each of the {topology.devices} devices of '
                                         f'{topology.name}, or for each mesh.{MATRIX_AXIS} of them, up to {LARGEST_MODEL}'))
  return sorted(found, key=rank)


def rank(one: Estimate) -> tuple[bool, float, float]:
  """What candidates are sorted by, the best the smallest."""
  return not one.fits, (one.bounds.overlapped + one.bounds.sequential) / 2, one.needed


def candidates(config: Config, topology: Topology) -> Iterator[dict[str, Value]]:
  """Overrides of every layout to try, as dotted names; the batch stays what it is."""
  policies = dict.fromkeys(('none', 'dots', 'full', config.compute.remat))
  replicas = [topology.slices] if topology.chip.is_tpu else sorted({1, topology.groups})
  for replica, model in itertools.product(replicas, _divisors(min(topology.devices, LARGEST_MODEL))):
    if topology.devices % (replica * model):
      continue
    rows = config.batch_size // (topology.devices // model)  # of a device, if all run at once
    for parts in filter(lambda n: rows % n == 0, _divisors(rows)) if rows else ():
      for stage, policy in itertools.product(STAGES, policies):
        if stage and topology.devices == replica * model:
          continue  # nothing to share out
        mesh = {f'mesh.{SLICE_AXES[0]}': replica, f'mesh.{REST_AXIS}': -1, f'mesh.{MATRIX_AXIS}': model}
        named = {} if policy == 'names' else {'compute.saved': (), 'compute.offloaded': ()}
        yield mesh | {'zero_stage': stage, 'compute.remat': policy, 'microbatches': parts} | named


def confirm(ranked: list[Estimate]) -> Iterator[Estimate]:
  """Compiles the candidates that should fit, in their order, up to the first whose program does."""
  for one in ranked:
    if not one.fits:
      return
    done = one.compile()
    yield done
    if done.fits:
      return


def settings(one: Estimate) -> dict[str, Value]:
  """What a candidate is told apart by, as flags of a config."""
  flat = configs.flatten(one.config)
  names = ('zero_stage', 'compute.remat', 'microbatches')
  return {f'mesh.{name}': size for name, size in one.sizes.items()} | {name: flat[name] for name in names}


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]
