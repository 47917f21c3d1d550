"""Mixtures: which component each row comes from, and which of the component's rows it is."""

from collections.abc import Sequence

import numpy as np

from gptjax.config import UserError

CYCLE = 2**16  # rows after which a mixture repeats its pattern; weights are rounded to multiples of one row per cycle
_UNREACHABLE = 2**62  # a row that no run reaches


class _Span:
  """The rows from `first` on with constant weights [components], of which `taken` [components] rows were taken before."""

  def __init__(self, first: int, taken: np.ndarray, weights: Sequence[float]):
    self.first, self.taken = first, taken
    self.quotas = _quotas(weights)
    """[components] rows of each per cycle"""
    # The t-th of n rows is due at (t + 1/2) / n of the cycle, which spreads every component evenly.
    order = np.argsort(np.concatenate([(np.arange(n) + 0.5) / n for n in self.quotas]), kind='stable')
    self.pattern = np.repeat(np.arange(len(self.quotas)), self.quotas)[order]
    """[cycle] component of each row"""
    self.ranks = np.concatenate([np.arange(n) for n in self.quotas])[order]
    """[cycle] number of earlier rows of the same component in the cycle"""

  def taken_before(self, row: int) -> np.ndarray:
    """Rows [components] taken of each before `row`."""
    cycles, rest = divmod(row - self.first, len(self.pattern))
    return self.taken + cycles * self.quotas + np.bincount(self.pattern[:rest], minlength=len(self.quotas))

  def end_of(self, component: int, rows: int) -> int:
    """The first row after `rows` rows of a component have been taken."""
    cycles, rest = divmod(rows - int(self.taken[component]) - 1, int(self.quotas[component]))
    return self.first + cycles * len(self.pattern) + int(np.flatnonzero(self.pattern == component)[rest]) + 1


class Mixture:
  """Assigns rows to components as evenly as their weights allow; each component's rows are in order and consecutive.

  A pattern of CYCLE rows repeats, so that in any range of rows a component deviates from its weight by only a few rows. Weights are
  relative (all 0: `counts`, the rows per pass over each component); later `phases` are (first row, weights), in order. `limits` are
  the maximum number of rows of each component (0: none).
  """

  def __init__(self, counts: Sequence[int], weights: Sequence[float], limits: Sequence[int] = (),
               phases: Sequence[tuple[int, Sequence[float]]] = ()):
    phases = [(row, later) for row, later in phases if row < _UNREACHABLE]
    ends = [row for row, _ in phases]
    if ends != sorted(set(ends)) or any(row < 1 for row in ends):
      raise UserError('data.phases: start', ends, 'phase starts above 0, in increasing order')
    limits = list(limits) or [0] * len(counts)
    self.rows: int | None = None
    """number of rows; None: endless"""
    self._spans: list[_Span] = []
    taken, row = np.zeros(len(counts), np.int64), 0
    for phase_weights, end in zip([weights if any(weights) else counts, *(later for _, later in phases)], [*ends, None]):
      while end is None or row < end:
        left = [0.0 if limit and taken[k] >= limit else float(weight) for k, (weight, limit) in enumerate(zip(phase_weights, limits))]
        if not any(left):
          self.rows = row
          return
        span = _Span(row, taken, left)
        self._spans.append(span)
        stops = [span.end_of(k, limit) for k, limit in enumerate(limits) if limit and left[k]] + ([] if end is None else [end])
        if not stops:
          return
        row = min(stops)
        taken = span.taken_before(row)

  def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Component [n] of each row, and its index [n] among the component's rows; raises a UserError if a row is after the last."""
    if self.rows is not None and rows.max(initial=-1) >= self.rows:
      raise UserError('steps', f'row {rows.max():,}', f'at most the {self.rows:,} rows that data.train has within its epochs')
    components, indices = np.empty_like(rows), np.empty_like(rows)
    spans = np.searchsorted([span.first for span in self._spans], rows, 'right') - 1
    for number in np.unique(spans):
      here, span = spans == number, self._spans[number]
      cycles, slots = np.divmod(rows[here] - span.first, len(span.pattern))
      component = components[here] = span.pattern[slots]
      indices[here] = span.taken[component] + cycles * span.quotas[component] + span.ranks[slots]
    return components, indices


def _quotas(weights: Sequence[float]) -> np.ndarray:
  """Rows per cycle for each weight, by the largest-remainder method; at least one where a weight is above 0."""
  share = np.asarray(weights, np.float64) / max(weights)
  share /= share.sum()
  cycle = CYCLE if np.count_nonzero(share) > 1 else 1
  exact = share * cycle
  quotas = np.maximum(np.floor(exact), share > 0).astype(np.int64)
  order = np.argsort(quotas - exact, kind='stable')  # largest remainder first
  quotas[order[share[order] > 0][:max(cycle - quotas.sum(), 0)]] += 1
  while quotas.sum() > cycle:  # many tiny weights were rounded up
    quotas[quotas.argmax()] -= 1
  return quotas
