"""Where the executor of a schedule keeps what operations hand on: a place for every array, assigned before anything is compiled."""

import dataclasses
import heapq
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


class _Memory:
  """Places that are taken and given back, the lowest first."""

  def __init__(self):
    self._free: list[int] = []
    self.size = 0
    """number of places that have been used"""

  def take(self) -> int:
    if self._free:
      return heapq.heappop(self._free)
    self.size += 1
    return self.size - 1

  def give(self, place: int) -> int:
    heapq.heappush(self._free, place)
    return place


class _Stage:
  """The memories of one stage, and what lies where in them."""

  def __init__(self, kept: Sequence[int], factors: Sequence[int]):
    self.kinds = {'F': kept, 'B': factors}
    self.arrivals = {'F': _Memory(), 'B': _Memory()}
    self.memories = [_Memory() for _ in range(max([*kept, *factors], default=-1) + 1)]
    self._held: dict[tuple, Any] = {}

  def arrive(self, one: Operation) -> int:
    """Takes a place for the input of an operation."""
    place = self._held['input', one] = self.arrivals[one.kind].take()
    return place

  def read(self, one: Operation) -> int:
    """Gives back the place of its input."""
    return self.arrivals[one.kind].give(self._held.pop(('input', one)))

  def keep(self, one: Operation) -> list[int]:
    """Takes places for the arrays that F or B keeps."""
    places = self._held['kept', one] = [self.memories[kind].take() for kind in self.kinds[one.kind]]
    return places

  def release(self, one: Operation) -> list[int]:
    """Gives back the places of what F or B kept."""
    places = self._held.pop(('kept', one))
    return [self.memories[kind].give(place) for kind, place in zip(self.kinds[one.kind], places, strict=True)]


def assign_places(schedule: Schedule, kept: Sequence[int], factors: Sequence[int]) -> Places:
  """Assigns the places of a schedule; `kept` and `factors` are the kinds of the arrays that F and B keep. A kind shares a memory."""
  count, last = schedule.stages, schedule.stages * schedule.chunks - 1
  stages = [_Stage(kept, factors) for _ in range(count)]
  nowhere, table = -1, np.zeros((schedule.ticks, count, 7 + len(kept) + len(factors)), np.int32)
  table[:, :, 4:7] = nowhere
  for cells, row in zip(table, schedule.table, strict=True):
    for stage, (memory, one) in enumerate(zip(stages, row, strict=True)):
      if one is None:
        continue
      cells[stage, :3] = ' FBW'.index(one.kind), one.microbatch, one.chunk
      if one.kind == 'F':
        cells[stage, 3] = memory.read(one) if one.chunk or stage else 0
        cells[stage, 7:7 + len(kept)] = memory.keep(one)
      elif one.kind == 'B':
        cells[stage, 3] = memory.read(one)
        cells[stage, 7:7 + len(kept)] = memory.release(one._replace(kind='F'))
        cells[stage, 7 + len(kept):] = memory.keep(one)
      else:
        cells[stage, 7 + len(kept):] = memory.release(one._replace(kind='B'))
    for stage, one in enumerate(row):  # what they send can take a place that was read at the same tick
      virtual = 0 if one is None else one.chunk * count + stage
      if one is not None and one.kind == 'F':
        to, column = (virtual + 1, 4) if virtual < last else (virtual, 6)
        cells[to % count, column] = stages[to % count].arrive(Operation('F' if virtual < last else 'B', one.microbatch, to // count))
      elif one is not None and one.kind == 'B' and virtual:
        cells[(virtual - 1) % count, 5] = stages[(virtual - 1) % count].arrive(one._replace(chunk=(virtual - 1) // count))
  sizes = [max(memory.arrivals[kind].size for memory in stages) for kind in 'FB']
  for column, size in zip((4, 5, 6), (sizes[0], sizes[1], sizes[1]), strict=True):
    table[:, :, column][table[:, :, column] == nowhere] = size
  columns = [table[:, :, column] for column in range(7)]
  ticks = Tick._make([*columns, table[:, :, 7:7 + len(kept)], table[:, :, 7 + len(kept):]])
  memories = zip(*(memory.memories for memory in stages))
  return Places(ticks, sizes[0] + 1, sizes[1] + 1, [max(memory.size for memory in same) for same in memories])
