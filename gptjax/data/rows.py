"""Rows for training and evaluation, each a pure function of its index.

The data state of a training run is the number of rows it has taken.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gptjax.data.mixture import Mixture
from gptjax.data.permutation import mix, permute
from gptjax.data.store import TokenStore

Batch = dict[str, np.ndarray]
"""Arrays [B, T]: int32 tokens and targets, float32 mask; if documents are isolated, int32 positions and segments."""


class Layout(Protocol):
  """Cuts a store into `count` rows that contain each of its targets once."""

  store: TokenStore
  count: int

  def pieces(self, rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of the store's stream that make up rows [n] of an epoch; `draws` [n] are random uint64, equal within an epoch.

    Returns:
      Positions and lengths [pieces], in order, and the number of pieces of each row [n].
    """


class Windows:
  """Concatenate and cut: windows of `context` tokens over the circular stream; the last of an epoch is padded."""

  def __init__(self, store: TokenStore, context: int):
    self.store = store
    self.context = context
    self.count = -(-store.tokens // context)

  def pieces(self, rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See Layout. The offset of an epoch's first window, below `context`, is its draw."""
    starts = rows * self.context
    offsets = (draws % np.uint64(self.context)).astype(np.int64)
    return (starts + offsets) % self.store.tokens, np.minimum(self.store.tokens - starts, self.context), np.ones_like(rows)


class Frame:
  """A batch of shape (B, T) that is filled from layouts."""

  def __init__(self, shape: tuple[int, int]):
    self.tokens = np.zeros(shape, np.int32)
    self.targets = np.zeros(shape, np.int32)
    self.starts = np.zeros(shape, bool)
    """where a document, or a row, starts"""
    self.starts[:, 0] = True
    self.lengths = np.zeros(shape[0], np.int64)
    """tokens of each row; the rest is padding"""
    self.loss_mask = np.ones(shape, bool)
    """False where the target is not predictable: a document's start after another's end"""

  def fill(self, layout: Layout, slots: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> None:
    """Writes rows [n] of an epoch of a layout to `slots` [n]; `draws` as in Layout.pieces."""
    positions, lengths, pieces = layout.pieces(rows, draws)
    # Each piece is read with the id after it, its last target; where a document ends, that is the separator of the next one.
    ids = layout.store.read(positions, lengths + 1)
    ends = np.cumsum(lengths + 1)
    tokens, targets = np.delete(ids, ends - 1), np.delete(ids, ends - 1 - lengths)
    row_lengths = np.add.reduceat(lengths, np.cumsum(pieces) - pieces)
    row_ends = np.cumsum(row_lengths)
    for slot, length, end in zip(slots.tolist(), row_lengths.tolist(), row_ends.tolist()):
      self.tokens[slot, :length], self.targets[slot, :length] = tokens[end - length:end], targets[end - length:end]
    self.lengths[slots] = row_lengths
    columns = np.cumsum(lengths) - lengths - np.repeat(row_ends - row_lengths, pieces)  # of the first token of each piece
    self.starts[slots] |= self.tokens[slots] == layout.store.separator
    self.starts[np.repeat(slots, pieces), columns] = True
    if layout.store.end != layout.store.separator:
      self.loss_mask[slots] = self.targets[slots] != layout.store.separator

  def batch(self, isolate_documents: bool) -> Batch:
    """The model's inputs. Padding has segment 0, mask 0 and an arbitrary id."""
    shape = self.tokens.shape
    real = np.arange(shape[1]) < self.lengths[:, None]
    batch = {'tokens': self.tokens, 'targets': self.targets, 'mask': (real & self.loss_mask).astype(np.float32)}
    if isolate_documents:
      starts = np.flatnonzero(self.starts)  # each row starts a segment, so all rows can be treated as one sequence of segments
      rows, lengths = starts // shape[1], np.diff(starts, append=self.starts.size)
      numbers = np.arange(1, len(starts) + 1) - np.searchsorted(rows, rows)
      segments = np.repeat(numbers.astype(np.int32), lengths).reshape(shape) * real
      positions = np.arange(self.starts.size, dtype=np.int32) - np.repeat(starts.astype(np.int32), lengths)
      batch |= {'positions': positions.reshape(shape), 'segments': segments}
    return batch


@dataclasses.dataclass(frozen=True, eq=False)
class TrainRows:
  """An endless sequence of rows over a mixture. Each component is repeated epoch by epoch, each epoch in its own order.

  The order is a permutation drawn by a hash of (seed, component, epoch), so that any row takes constant time and no table.
  """

  layouts: Sequence[Layout]
  """the components"""
  mixture: Mixture
  context: int
  """T, tokens per row"""
  seed: int
  """0 or more"""
  isolate_documents: bool
  """whether batches have positions and segments"""

  @property
  def rows_per_epoch(self) -> int:
    """Rows that contain every component once."""
    return sum(layout.count for layout in self.layouts)

  def batch(self, rows: np.ndarray) -> Batch:
    """Rows at indices [n], as arrays [n, T].

    tokens and targets: ids; targets are shifted by one. positions: tokens since the start of the document or of the row,
    whichever is later. segments: documents of a row, numbered from 1; 0 for padding. mask: 1, or 0 for padding and where there is
    no target. Raises a UserError if a row is beyond the mixture's last, or a store is damaged.
    """
    frame = Frame((len(rows), self.context))
    components, indices = self.mixture.locate(np.asarray(rows, np.int64))
    for component in np.unique(components):
      slots = np.flatnonzero(components == component)
      layout = self.layouts[component]
      epochs, within = np.divmod(indices[slots], layout.count)
      # The seed is hashed before the epoch is added, so that seed 0 in epoch 1 is not seed 1 in epoch 0.
      keys = mix(mix(np.full(1, (self.seed + (int(component) << 32)) % 2**64, np.uint64)) + epochs.astype(np.uint64))
      frame.fill(layout, slots, permute(within, layout.count, keys), mix(keys + np.uint64(1)))
    return frame.batch(self.isolate_documents)


class EvalRows:
  """Non-overlapping windows over a store, in order; the last one is padded. Every target of the store occurs exactly once."""

  def __init__(self, store: TokenStore, context: int, isolate_documents: bool):
    self.store = store
    self.context = context
    self.isolate_documents = isolate_documents
    self._windows = Windows(store, context)
    self.count = self._windows.count

  def batch(self, rows: np.ndarray) -> Batch:
    """Rows at indices [n] as arrays [n, T], as in TrainRows.batch. Rows from `count` on are padding, to fill the last batch."""
    rows = np.asarray(rows, np.int64)
    frame = Frame((len(rows), self.context))
    slots = np.flatnonzero(rows < self.count)
    frame.fill(self._windows, slots, rows[slots], np.zeros(len(slots), np.uint64))
    return frame.batch(self.isolate_documents)
