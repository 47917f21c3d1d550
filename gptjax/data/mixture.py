"""Mixtures: which component each row comes from, and which of the component's rows it is."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from gptjax.config import UserError

CYCLE = 2**16
"""Rows after which a mixture repeats its pattern; shares are multiples of one row in so many."""

_NEVER = 2**62
"""No run comes to such a row."""


@dataclasses.dataclass(frozen=True)
class _Stretch:
  """Rows over which the shares do not change."""

  first: int
  """its first row"""
  taken: np.ndarray
  """[components] rows taken of each before it"""
  pattern: np.ndarray
  """[cycle] component of each row of a cycle"""
  ranks: np.ndarray
  """[cycle] how many rows before it in its cycle are of its component"""
  quotas: np.ndarray
  """[components] rows of each in a cycle"""

  def taken_until(self, row: int) -> np.ndarray:
    """Rows [components] taken of each before `row`."""
    cycles, rest = divmod(row - self.first, len(self.pattern))
    return self.taken + cycles * self.quotas + np.bincount(self.pattern[:rest], minlength=len(self.quotas))

  def end_of(self, component: int, rows: int) -> int:
    """The row after the one with which so many rows of a component have been taken."""
    cycles, rest = divmod(rows - int(self.taken[component]) - 1, int(self.quotas[component]))
    return self.first + cycles * len(self.pattern) + int(np.flatnonzero(self.pattern == component)[rest]) + 1


class Mixture:
  """Deals rows out to components as evenly as their weights allow, each component's rows in order and without a gap.

  A pattern of CYCLE rows repeats; in any stretch of rows a component is at most some rows away from its share. Weights are
  constant over stretches of rows: they change where a phase begins and where a component has used up its passes.

  Args:
    counts: rows of one pass over each component.
    weights: of each component, relative; all 0: as their counts. Each gets at least a row of a cycle.
    limits: most rows of each component; 0: none.
    phases: (first row, weights) of what comes later, in order.
  """

  def __init__(self, counts: Sequence[int], weights: Sequence[float], limits: Sequence[int] = (),
               phases: Sequence[tuple[int, Sequence[float]]] = ()):
    start = list(weights) if any(weights) else [float(count) for count in counts]
    phases = [(row, later) for row, later in phases if row < _NEVER]
    ends = [row for row, _ in phases]
    if ends != sorted(set(ends)) or any(row < 1 for row in ends):
      raise UserError('data.phases: start', ends, 'rows after the first one, each later than the one before')
    limits = list(limits) or [0] * len(counts)
    self.rows: int | None = None
    """rows there are; None: endless"""
    self._stretches: list[_Stretch] = []
    taken = np.zeros(len(counts), np.int64)
    row = 0
    for weights_now, end in zip([start, *(list(w) for _, w in phases)], [*ends, None]):
      while end is None or row < end:
        left = [0.0 if limit and taken[k] >= limit else weight for k, (weight, limit) in enumerate(zip(weights_now, limits))]
        if not any(left):
          self.rows = row
          return
        stretch = _Stretch(row, taken, *_pattern(left))
        self._stretches.append(stretch)
        stops = [stretch.end_of(k, limit) for k, limit in enumerate(limits) if limit and left[k]]
        if end is None and not stops:
          return
        row = min([*stops, *([end] if end is not None else [])])
        taken = stretch.taken_until(row)

  def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Component [n] of each row, and which row of that component, counted over all its passes, [n].

    Raises:
      UserError: a row after the last.
    """
    if self.rows is not None and rows.max(initial=-1) >= self.rows:
      raise UserError('steps', f'row {rows.max():,}', f'at most the {self.rows:,} rows that data.train has within its epochs')
    components, indices = np.empty_like(rows), np.empty_like(rows)
    which = np.searchsorted([stretch.first for stretch in self._stretches], rows, 'right') - 1
    for number in np.unique(which):
      here, stretch = which == number, self._stretches[number]
      cycles, slots = np.divmod(rows[here] - stretch.first, len(stretch.pattern))
      dealt = stretch.pattern[slots]
      components[here] = dealt
      indices[here] = stretch.taken[dealt] + cycles * stretch.quotas[dealt] + stretch.ranks[slots]
    return components, indices


def _pattern(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Component and rank of each row of a cycle, and the rows of each component in it."""
  quotas = _quotas(weights)
  # The t-th of n rows is due at (t + 1/2) / n of the cycle, so every component is spread evenly over it.
  due = np.concatenate([(np.arange(n) + 0.5) / n for n in quotas])
  order = np.argsort(due, kind='stable')
  components = np.repeat(np.arange(len(quotas)), quotas)[order]
  ranks = np.concatenate([np.arange(n) for n in quotas])[order]
  return components, ranks, quotas


def _quotas(weights: Sequence[float]) -> np.ndarray:
  """Whole rows of a cycle for each weight, by largest remainder; at least one where a weight is above 0."""
  share = np.asarray(weights, np.float64) / max(weights)
  share /= share.sum()
  cycle = CYCLE if np.count_nonzero(share) > 1 else 1
  exact = share * cycle
  quotas = np.maximum(np.floor(exact), share > 0).astype(np.int64)
  short = cycle - int(quotas.sum())
  order = np.argsort(quotas - exact, kind='stable')  # those with the largest remainder first
  for k in itertools.islice(itertools.cycle(order[share[order] > 0].tolist()), max(short, 0)):
    quotas[k] += 1
  while quotas.sum() > cycle:  # many tiny weights were rounded up
    quotas[quotas.argmax()] -= 1
  return quotas
