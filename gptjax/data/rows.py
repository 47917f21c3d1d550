"""Rows: what a training step and an evaluation read, each a pure function of its index.

All that a training run has to remember of its data is how many rows it has taken.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from gptjax.data.mixture import Mixture
from gptjax.data.packing import Plan
from gptjax.data.permutation import mix, permute
from gptjax.data.store import TokenStore

Batch = dict[str, np.ndarray]
"""Arrays of shape [B, T]: int32 tokens and targets, float32 mask; where documents are isolated, int32 positions, segments."""


class Layout(Protocol):
  """How a store becomes rows: `count` of them hold each of its targets once."""

  store: TokenStore
  count: int

  def fill(self, frame: 'Frame', slots: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> None:
    """Puts rows [n] of an epoch into the frame's `slots` [n]; `draws` [n], uint64, are equal within an epoch."""


class Frame:
  """A batch while it is filled.

  Args:
    shape: B, T.
  """

  def __init__(self, shape: tuple[int, int]):
    self.tokens = np.zeros(shape, np.int32)
    self.targets = np.zeros(shape, np.int32)
    self.begins = np.zeros(shape, bool)
    """where a document, or a row, begins"""
    self.begins[:, 0] = True
    self.used = np.zeros(shape[0], np.int64)
    """tokens of each row, from its start; what comes after is padding"""
    self.foretold = np.ones(shape, bool)
    """where the target is one: not a document's beginning after another one's end"""

  def take(self, layout: Layout, slots: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> None:
    """Has a layout fill some slots, and leaves out what its store says is no target."""
    layout.fill(self, slots, rows, draws)
    if layout.store.end != layout.store.separator:
      self.foretold[slots] = self.targets[slots] != layout.store.separator

  def batch(self, isolate_documents: bool) -> Batch:
    """The arrays for the model. Padding has segment 0 and mask 0; the id that stands there means nothing."""
    shape = self.tokens.shape
    real = np.arange(shape[1]) < self.used[:, None]
    batch = {'tokens': self.tokens, 'targets': self.targets, 'mask': (real & self.foretold).astype(np.float32)}
    if isolate_documents:
      # Every row begins a stretch, so the stretches can be laid end to end over all rows.
      begins = np.flatnonzero(self.begins)
      lengths = np.diff(begins, append=self.begins.size)
      per_row = np.bincount(begins // shape[1], minlength=shape[0])
      numbers = np.arange(1, len(begins) + 1) - np.repeat(np.cumsum(per_row) - per_row, per_row)
      segments = np.repeat(numbers.astype(np.int32), lengths).reshape(shape)
      if not real.all():
        segments *= real
      places = np.arange(self.begins.size, dtype=np.int32) - np.repeat(begins.astype(np.int32), lengths)
      batch |= {'positions': places.reshape(shape), 'segments': segments}
    return batch


class Windows:
  """Concatenate, then cut: windows of T over the circle of all documents; the last of an epoch is padded.

  Args:
    store: the tokens.
    context: T, tokens a row.
  """

  def __init__(self, store: TokenStore, context: int):
    self.store = store
    self.context = context
    self.count = -(-store.tokens // context)

  def fill(self, frame: Frame, slots: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> None:
    """See Layout; an epoch's first window starts at a place below T that its draw decides."""
    begin = rows * self.context
    used = np.minimum(self.store.tokens - begin, self.context)
    begin = (begin + (draws % np.uint64(self.context)).astype(np.int64)) % self.store.tokens
    ids = self.store.read(begin, used + 1)
    frame.used[slots] = used
    if (used == self.context).all():
      ids = ids.reshape(len(slots), self.context + 1)
      frame.tokens[slots], frame.targets[slots] = ids[:, :-1], ids[:, 1:]
    else:
      for slot, length, end in zip(slots, used, np.cumsum(used + 1)):
        row = ids[end - length - 1:end]
        frame.tokens[slot, :length], frame.targets[slot, :length] = row[:-1], row[1:]
    # The separator stands nowhere but where a document begins.
    frame.begins[slots, 1:] = frame.tokens[slots, 1:] == self.store.separator


class Packed:
  """Rows of whole documents, or of pieces of documents longer than a row, as a plan lays them out.

  Args:
    store: the tokens.
    plan: made for this store.
  """

  def __init__(self, store: TokenStore, plan: Plan):
    self.store = store
    self.plan = plan
    self.count = plan.rows

  def fill(self, frame: Frame, slots: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> None:
    """See Layout."""
    places, lengths, pieces = self.plan.pieces(rows)
    row = np.repeat(slots, pieces)
    ends = np.cumsum(lengths)
    used = np.add.reduceat(lengths, np.cumsum(pieces) - pieces)
    ids = self.store.read(places, lengths)
    for slot, length, end in zip(slots.tolist(), used.tolist(), np.cumsum(used).tolist()):
      frame.tokens[slot, :length] = ids[end - length:end]
    frame.used[slots] = used
    frame.targets[slots, :-1] = frame.tokens[slots, 1:]
    last = ends - np.repeat(np.cumsum(used) - used, pieces) - 1  # of each piece, in its row
    frame.begins[row, last - lengths + 1] = True
    frame.targets[row, last] = self.store.separator
    # Only a row that is one piece can end inside a document.
    full = lengths == frame.tokens.shape[1]
    frame.targets[row[full], -1] = self.store.read((places + lengths)[full] % self.store.tokens, np.ones(full.sum(), np.int64))


class TrainRows:
  """An endless sequence of rows over a mixture: each component epoch after epoch, each epoch in an order of its own.

  The order is a permutation that a hash of (seed, component, epoch) draws: no table to keep, any row in constant time.

  Args:
    layouts: the components.
    mixture: which row is whose.
    context: T, tokens a row.
    seed: 0 or more; another seed gives other orders.
    isolate_documents: whether positions and segments are made.
  """

  def __init__(self, layouts: Sequence[Layout], mixture: Mixture, context: int, seed: int, isolate_documents: bool):
    self.layouts = layouts
    self.mixture = mixture
    self.context = context
    self.seed = seed
    self.isolate_documents = isolate_documents
    self.rows_per_epoch = sum(layout.count for layout in layouts)
    """rows that hold every component once"""

  def batch(self, rows: np.ndarray) -> Batch:
    """Rows at indices [n], as arrays [n, T].

    tokens and targets: ids; targets are one step ahead. positions: tokens since the later of the document's and the row's
    start. segments: 1, 2, ... by document within the row, 0 for padding. mask: 1, 0 for padding and where there is no target.

    Raises:
      UserError: a row that the mixture does not have, or a damaged store.
    """
    frame = Frame((len(rows), self.context))
    components, indices = self.mixture.locate(np.asarray(rows, np.int64))
    for component in np.unique(components):
      slots = np.flatnonzero(components == component)
      layout = self.layouts[component]
      epochs, within = np.divmod(indices[slots], layout.count)
      keys = mix(self._seed(component) + epochs.astype(np.uint64))
      frame.take(layout, slots, permute(within, layout.count, keys), mix(keys + np.uint64(1)))
    return frame.batch(self.isolate_documents)

  def _seed(self, component: int) -> np.ndarray:
    # Hashed before the epoch is added: seed 0 in epoch 1 is not seed 1 in epoch 0.
    return mix(np.full(1, (self.seed + (int(component) << 32)) % 2**64, np.uint64))


class EvalRows:
  """Non-overlapping windows over a store, in order; the last one is padded.

  Every token of every document and its end is a target exactly once.

  Args:
    store: the tokens.
    context: T, tokens a row.
    isolate_documents: whether positions and segments are made.
  """

  def __init__(self, store: TokenStore, context: int, isolate_documents: bool):
    self.store = store
    self.context = context
    self.isolate_documents = isolate_documents
    self._windows = Windows(store, context)
    self.count = self._windows.count

  def batch(self, rows: np.ndarray) -> Batch:
    """Rows at indices [n] as arrays [n, T], laid out as TrainRows.batch does.

    Rows from `count` on are all padding, so the last batch of an evaluation can be as large as the others.
    """
    rows = np.asarray(rows, np.int64)
    frame = Frame((len(rows), self.context))
    slots = np.flatnonzero(rows < self.count)
    frame.take(self._windows, slots, rows[slots], np.zeros(len(slots), np.uint64))
    return frame.batch(self.isolate_documents)
