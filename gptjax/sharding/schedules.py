"""Pipeline schedules as data: which operation each stage runs at each tick. They are made, checked and drawn without a device.

Virtual stage v = chunk * stages + stage holds consecutive layers. Of each microbatch it runs F, its forward pass; B, the gradient of its
input; and W, the gradients of its weights. A tick is the time of one operation, and a result reaches the next stage one tick later.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class Operation(NamedTuple):
  """One pass of a microbatch through a chunk of layers of a stage."""

  kind: str
  """F, B or W"""
  microbatch: int
  chunk: int = 0


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A table of operations."""

  stages: int
  microbatches: int
  chunks: int
  table: tuple[tuple[Operation | None, ...], ...]
  """[ticks][stages]; None: the stage is idle"""

  @property
  def ticks(self) -> int:
    """Length of a step, in operations of one chunk."""
    return len(self.table)

  @functools.cached_property
  def bubble(self) -> float:
    """Fraction of the ticks at which a stage is idle."""
    return 1 - sum(one is not None for row in self.table for one in row) / (self.ticks * self.stages)

  @functools.cached_property
  def peak(self) -> int:
    """The highest number of microbatches and chunks whose activations a stage keeps."""
    return max(self.kept())

  def kept(self, first: str = 'F', last: str = 'W') -> list[int]:
    """Per stage, the highest number of microbatches and chunks that are between two operations, and whose activations are kept."""
    most, now = [0] * self.stages, [0] * self.stages
    for row in self.table:
      for stage, one in enumerate(row):
        now[stage] += one is not None and one.kind == first
        most[stage] = max(most[stage], now[stage])
        now[stage] -= one is not None and one.kind == last
    return most

  def check(self) -> None:
    """Raises a ValueError that names an operation that is missing, repeated or too early."""
    when: dict[tuple[int, Operation], int] = {}
    for tick, row in enumerate(self.table):
      for stage, one in enumerate(row):
        if one is not None and when.setdefault((stage, one), tick) != tick:
          raise ValueError(f'{one} of stage {stage} is repeated at tick {tick}')
    expected = {(stage, Operation(kind, microbatch, chunk)) for stage in range(self.stages) for kind in 'FBW'
                for microbatch in range(self.microbatches) for chunk in range(self.chunks)}
    if wrong := expected ^ when.keys():
      raise ValueError(f'operations are missing or unknown: {sorted(wrong)[:3]}')
    for (stage, one), tick in when.items():
      for needed in self._needs(stage, one):
        if when[needed] >= tick:
          raise ValueError(f'{one} of stage {stage} at tick {tick} is not after {needed[1]} of stage {needed[0]}')

  def _needs(self, stage: int, one: Operation) -> Iterator[tuple[int, Operation]]:
    """What must be done before an operation."""
    return needs(self.stages, self.chunks, stage, one)

  def __str__(self) -> str:
    """A row per stage, a column per tick: F3 is the forward pass of microbatch 3, F3.1 through chunk 1."""
    def cell(one: Operation | None) -> str:
      return '' if one is None else f'{one.kind}{one.microbatch}' + (f'.{one.chunk}' if self.chunks > 1 else '')
    width = max(len(cell(one)) for row in self.table for one in row)
    return '\n'.join(f'stage {stage}  ' + ' '.join(cell(row[stage]).ljust(width) for row in self.table).rstrip()
                     for stage in range(self.stages))


def needs(stages: int, chunks: int, stage: int, one: Operation) -> Iterator[tuple[int, Operation]]:
  """The operations, with their stages, whose results an operation reads."""
  virtual = one.chunk * stages + stage
  if one.kind == 'F' and virtual:
    yield (virtual - 1) % stages, one._replace(chunk=(virtual - 1) // stages)
  if one.kind == 'B':
    yield stage, one._replace(kind='F')
    if virtual < stages * chunks - 1:
      yield (virtual + 1) % stages, one._replace(chunk=(virtual + 1) // stages)
  if one.kind == 'W':
    yield stage, one._replace(kind='B')


Orders = Iterable[Operation]
"""The operations of one stage in the order in which it runs them."""


def _gpipe(stage: int, stages: int, microbatches: int, chunks: int) -> Orders:
  """All forward passes, then all backward passes (arXiv:1811.06965)."""
  yield from (Operation('F', m) for m in range(microbatches))
  yield from (Operation(kind, m) for m in range(microbatches) for kind in 'BW')


def _1f1b(stage: int, stages: int, microbatches: int, chunks: int) -> Orders:
  """A backward pass as soon as there is one, so that a stage keeps at most as many microbatches as there are stages (arXiv:1806.03377)."""
  return _zbh1(0, stages - stage, microbatches, chunks)


def _interleaved(stage: int, stages: int, microbatches: int, chunks: int) -> Orders:
  """1F1B with several chunks per stage, which divide the bubble (arXiv:2104.04473, section 2.2)."""
  # Rounds have at least as many microbatches as there are stages, so that the first one is back when the last has left. The order is that
  # of rounds of equal length, without the microbatches that a shorter one lacks.
  rounds = max(microbatches // stages, 1)
  longest = -(-microbatches // rounds)
  starts = [round * (microbatches // rounds) + min(round, microbatches % rounds) for round in range(rounds + 1)]

  def passes(order: Iterable[int]) -> list[tuple[int, int] | None]:
    """Microbatch and chunk of each pass; None: it is left out."""
    return [(m, chunk) if m < end else None for start, end in zip(starts, starts[1:])
            for chunk in order for m in range(start, start + longest)]

  ahead = 2 * (stages - stage - 1) + (chunks - 1) * longest  # forward passes before the first backward pass
  forward, backward = passes(range(chunks)), passes(range(chunks)[::-1])
  for f, b in itertools.zip_longest(forward, [None] * min(ahead, len(forward)) + backward):
    if f:
      yield Operation('F', *f)
    if b:
      yield from (Operation(kind, *b) for kind in 'BW')


def _zbh1(stage: int, stages: int, microbatches: int, chunks: int) -> Orders:
  """1F1B in which stage s computes the gradients of weights s microbatches later, where it would be idle (ZB-H1, arXiv:2401.10241)."""
  ahead = min(stages - stage, microbatches)
  yield from (Operation('F', m) for m in range(ahead))
  for m in range(microbatches + stage):
    if m < microbatches:
      yield Operation('B', m)
    if m >= stage:
      yield Operation('W', m - stage)
    if m + ahead < microbatches:
      yield Operation('F', m + ahead)


SCHEDULES: dict[str, Callable[[int, int, int, int], Orders]] = {
  'GPipe': _gpipe, '1F1B': _1f1b, 'Interleaved1F1B': _interleaved, 'ZBH1': _zbh1}
"""Functions (stage, stages, microbatches, chunks) -> the stage's operations, by their name in config.pipeline.schedule."""


def make_schedule(name: str, stages: int, microbatches: int, chunks: int = 1) -> Schedule:
  """Lets each stage run its operations in order, each as soon as what it needs has arrived."""
  left = [collections.deque(SCHEDULES[name](stage, stages, microbatches, chunks)) for stage in range(stages)]
  done: set[tuple[int, Operation]] = set()
  table = []
  while any(left):
    row = [order[0] if order and done.issuperset(needs(stages, chunks, stage, order[0])) else None for stage, order in enumerate(left)]
    assert any(row), f'{name}: the stages wait for each other'
    for stage, one in enumerate(row):
      if one is not None:
        done.add((stage, left[stage].popleft()))
    table.append(tuple(row))
  return Schedule(stages, microbatches, chunks, tuple(table))
