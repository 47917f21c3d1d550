"""Where the executor of a schedule keeps what operations hand on: a place for every array, assigned before anything is compiled."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.sharding.schedules import Operation, Schedule


class Tick(NamedTuple):
  """What a stage does at a tick, in numbers, and the places that it reads and writes."""

  operation: Any
  """0: none, 1: F, 2: B, 3: W"""
  microbatch: Any
  chunk: Any
  read: Any
  """F: of the activation that arrived; B: of the gradient that arrived, or in the last virtual stage of its own output"""
  store_activation: Any
  """for what arrives from the stage before at the end of the tick"""
  store_gradient: Any
  """for what arrives from the stage after"""
  store_output: Any
  """for the output of the last virtual stage, among the gradients"""
  kept: Any
  """of the arrays that F keeps for B"""
  factors: Any
  """of the arrays that B keeps for W"""


@dataclasses.dataclass(frozen=True)
class Places:
  """The table of a schedule with places, and how many of them there are."""

  ticks: Tick
  """arrays [ticks, stages, ...]"""
  activations: int
  gradients: int
  """of each memory for arrivals, the last place is for those that nobody reads"""
  kept: list[int]
  """of the memory for each kind of array"""


def assign_places(schedule: Schedule, kept: Sequence[int], factors: Sequence[int]) -> Places:
  """Assigns the places of a schedule; `kept` and `factors` are the kinds of the arrays that F and B keep. A kind shares a memory."""
  count, last = schedule.stages, schedule.stages * schedule.chunks - 1
  when = {(stage, one): tick for tick, row in enumerate(schedule.table) for stage, one in enumerate(row) if one is not None}
  empty = lambda value, *more: np.full((schedule.ticks, count, *more), value, np.int32)
  ticks = Tick._make([*(empty(value) for value in (0, 0, 0, 0, -1, -1, -1)), empty(0, len(kept)), empty(0, len(factors))])
  # By memory and stage: from which tick to which arrays are kept, and the cells of the table that name their places.
  lives: dict[tuple[Any, int], list] = collections.defaultdict(list)

  def keep(memory: Any, stage: int, start: int, end: int, stored: np.ndarray, read: np.ndarray) -> None:
    lives[memory, stage].append((start, end, stored[start, stage:], read[end, stage:]))

  for (stage, one), tick in when.items():
    virtual = one.chunk * count + stage
    ticks.operation[tick, stage], ticks.microbatch[tick, stage], ticks.chunk[tick, stage] = ' FBW'.index(one.kind), *one[1:]
    at = lambda kind, virtual: when[virtual % count, Operation(kind, one.microbatch, virtual // count)]
    if one.kind == 'F':
      if virtual:
        keep('activations', stage, at('F', virtual - 1), tick, ticks.store_activation, ticks.read)
      if virtual == last:
        keep('gradients', stage, tick, at('B', virtual), ticks.store_output, ticks.read)
      for index, kind in enumerate(kept):
        keep(kind, stage, tick, at('B', virtual), ticks.kept[..., index], ticks.kept[..., index])
    elif one.kind == 'B':
      if virtual < last:
        keep('gradients', stage, at('B', virtual + 1), tick, ticks.store_gradient, ticks.read)
      for index, kind in enumerate(factors):
        keep(kind, stage, tick, at('W', virtual), ticks.factors[..., index], ticks.factors[..., index])

  sizes: dict[Any, int] = collections.defaultdict(int)
  for (memory, _), arrays in lives.items():
    ends: list[int] = []  # at which tick each place is free again: what is stored at a tick replaces what is read at it
    for start, end, stored, read in sorted(arrays, key=lambda one: one[:2]):
      place = next((place for place, free in enumerate(ends) if free <= start), len(ends))
      ends[place:place + 1] = [end]
      stored[0] = read[0] = place
    sizes[memory] = max(sizes[memory], len(ends))
  for column, memory in ((ticks.store_activation, 'activations'), (ticks.store_gradient, 'gradients'), (ticks.store_output, 'gradients')):
    column[column < 0] = sizes[memory]
  kinds = range(max([*kept, *factors], default=-1) + 1)
  return Places(ticks, sizes['activations'] + 1, sizes['gradients'] + 1, [sizes[kind] for kind in kinds])
