"""Rows for training and evaluation, each a pure function of its index, and their loading ahead of the step that reads them."""

import contextlib
import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np

from gptjax.config import UserError
from gptjax.data.folders import LocalFolder
from gptjax.data.mixture import Mixture
from gptjax.data.progress import ProgressBar
from gptjax.data.store import PART_END, TokenStore
from gptjax.data.tokenizing import end_with_parent
from gptjax.files import atomic_directory, write_atomic

Batch = dict[str, np.ndarray]
"""Arrays [B, T]: int32 tokens and targets, float32 mask; if documents are isolated, int32 positions and segments."""


_GROUP = 65_536  # documents that are packed together: enough for dense rows, few enough to be packed in seconds
_PLAN = 2  # to be incremented when older plans become unreadable
_PIECE = np.dtype([('position', '<i8'), ('length', '<i8')])
_ROUNDS = 6  # of a Feistel network


class Windows:
  """Concatenate and cut: windows of `context` tokens over the circular stream; the last of an epoch is padded."""

  def __init__(self, store: TokenStore, context: int):
    self.store, self.context = store, context
    self.count = -(-store.tokens // context)

  def pieces(self, rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See Layout. The offset of an epoch's first window, below `context`, is its draw."""
    starts = rows * self.context
    offsets = (draws % np.uint64(self.context)).astype(np.int64)
    return (starts + offsets) % self.store.tokens, np.minimum(self.store.tokens - starts, self.context), np.ones_like(rows)


class Packed:
  """Rows of complete documents; those longer than `context`, the maximum tokens per row, are cut into full rows and a remainder.

  The kind is 'pack', a best fit of documents and remainders, or 'document', one piece per row. Examples are never in several pieces: with
  `cut`, only the first `context` tokens of longer ones are kept, if these have targets, and of texts to classify the last; the others,
  and pairs, are dropped. The pieces of each row are an index in `cache_dir/plans`, made first if necessary; only the needed entries are
  read.
  """

  def __init__(self, store: TokenStore, context: int, kind: str, cache_dir: Path, cut: bool = False):
    self.store, self.context = store, context
    directory = cache_dir / 'plans' / f'{store.sha256[:16]}-{kind}-{context}{"-cut" * (store.weighted and cut)}-v{_PLAN}'
    with atomic_directory(directory) as folder:
      if folder:
        _write(folder, store, context, best_fit if kind == 'pack' else lambda lengths, _: [[piece] for piece in range(len(lengths))], cut)
    self._folder = LocalFolder(str(directory))
    plan = json.loads(self._folder.read('plan.json'))
    self.count: int = plan['rows']
    self.padding = 1 - plan['tokens'] / (self.count * context)
    """fraction of positions that are padding"""
    self.dropped: int = plan['dropped']
    self.cut: int = plan['cut']
    """examples that are too long"""
    self.name = directory.name
    """of store, kind and context"""
    self.column: Column | None = None
    """log-probabilities of a reference"""

  def pieces(self, rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See Layout."""
    self._folder.count_touched(2 * len(rows), 0)
    bounds, table = self._folder.mapped('rows.bin').view('<i8'), self._folder.mapped('pieces.bin').view(_PIECE)
    counts = bounds[rows + 1] - bounds[rows]
    found = table[np.repeat(bounds[rows] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]
    return found['position'], found['length'], counts


def _write(folder: Path, store: TokenStore, context: int, pack: Callable[[np.ndarray, int], list[list[int]]], cut: bool) -> None:
  plan = {'rows': 0, 'pieces': 0, 'tokens': 0, 'dropped': 0, 'cut': 0}
  documents = 0
  with (folder / 'rows.bin').open('wb') as bounds, (folder / 'pieces.bin').open('wb') as file, \
      ProgressBar(f'packing rows of {context:,} tokens', store.documents, 'documents') as progress:
    bounds.write(np.zeros(1, '<i8').tobytes())
    for first in range(0, store.documents, _GROUP):
      starts = store.starts(first, min(first + _GROUP, store.documents))
      documents += int(starts[-1] - starts[0])
      group = _examples(store, starts, context, cut, plan) if store.weighted else _cut(starts, context)
      packed = pack(group['length'], context)
      counts = np.array([len(row) for row in packed], np.int64)
      bounds.write((plan['pieces'] + np.cumsum(counts)).astype('<i8').tobytes())
      file.write(group[np.concatenate([*packed, []]).astype(np.int64)].tobytes())
      plan['rows'] += len(packed)
      plan['pieces'] += len(group)
      plan['tokens'] += int(group['length'].sum())
      progress.advance(len(starts) - 1)
  if documents != store.tokens:
    raise UserError(store.location, f'documents of {documents:,} tokens', f'{store.tokens:,}, as in its manifest; prepare it again')
  if not plan['rows']:
    raise UserError('data.context', context, f'more: all {store.documents:,} examples of {store.location} are longer')
  write_atomic(folder / 'plan.json', json.dumps(plan) + '\n')


def _cut(starts: np.ndarray, context: int) -> np.ndarray:
  """Pieces of documents from their starts and the end of the last."""
  cuts = -(-np.diff(starts) // context)  # pieces of each document
  pieces = np.empty(cuts.sum(), _PIECE)
  within = np.arange(len(pieces)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
  pieces['position'] = np.repeat(starts[:-1], cuts) + within * context
  pieces['length'] = np.minimum(np.repeat(starts[1:], cuts) - pieces['position'], context)
  return pieces


def _examples(store: TokenStore, starts: np.ndarray, context: int, cut: bool, plan: dict[str, int]) -> np.ndarray:
  """A piece for each example that is not too long, or of which a part is kept; counts the others in the plan."""
  lengths, firsts = np.diff(starts), starts[:-1].copy()
  long = lengths > context
  for index in np.flatnonzero(long) if cut else ():
    if store.labels:
      firsts[index] += lengths[index] - context  # the class is the last target
    if store.parts == 1 and store.read([firsts[index]], [context], field='weight').any():
      long[index], lengths[index] = False, context
      plan['cut'] += 1
  plan['dropped'] += int(long.sum())
  pieces = np.empty((~long).sum(), _PIECE)
  pieces['position'], pieces['length'] = firsts[~long], lengths[~long]
  return pieces


def best_fit(lengths: np.ndarray, context: int) -> list[list[int]]:
  """The indices of each row's pieces, of 1 to `context` tokens, by best-fit decreasing bin packing (Johnson 1974; arXiv:2404.10830)."""
  context = min(context, int(lengths.sum()))  # no row is longer, and each size needs a list
  rows: list[list[int]] = []
  rows_by_space: list[list[list[int]]] = [[] for _ in range(context + 1)]
  spaces = 0  # bit s is set if a row has space s left
  sizes = lengths.tolist()
  for piece in np.argsort(-lengths, kind='stable').tolist():
    length = sizes[piece]
    fitting = spaces >> length
    if fitting:
      space = (fitting & -fitting).bit_length() - 1 + length
      row = rows_by_space[space].pop()
      if not rows_by_space[space]:
        spaces ^= 1 << space
      row.append(piece)
    else:
      space, row = context, [piece]
      rows.append(row)
    left = space - length
    if left:
      rows_by_space[left].append(row)
      spaces |= 1 << left
  return rows


class Column:
  """A float32 per token of the rows of a layout, in a file [rows, T]; each process maps it itself."""

  def __init__(self, path: Path, rows: int, context: int):
    self._path, self._shape = path, (rows, context)
    self._values: np.ndarray | None = None

  def __reduce__(self):
    return Column, (self._path, *self._shape)

  def load(self) -> None:
    """Maps the file, which may then be removed."""
    if self._values is None:
      self._values = np.memmap(self._path, np.float32, 'r', shape=self._shape)

  def read(self, rows: np.ndarray) -> np.ndarray:
    """Of rows [n], as [n, T]."""
    self.load()
    assert self._values is not None
    return self._values[rows]


Layout = Windows | Packed
"""Cuts a `store` into `count` rows that contain each of its targets once.

pieces(rows, draws) returns the pieces of the store's stream that make up rows [n] of an epoch; `draws` [n] are random uint64, equal
within an epoch. It returns positions and lengths [pieces], in order, and the number of pieces of each row [n]. A piece that another one
follows in its row ends with its document.
"""


class Frame:
  """`count` rows of `context` tokens that are filled from layouts of stores with the same tokenizer as `store`."""

  def __init__(self, count: int, context: int, store: TokenStore):
    self.separator, self.end = store.separator, store.end
    self.ids = np.zeros((count, context + 1), np.int32)
    """tokens of each row and the target of the last"""
    self.starts = np.zeros_like(self.ids, bool)
    """where a piece starts"""
    self.starts[:, 0] = True
    self.lengths = np.zeros(count, np.int64)
    """tokens of each row; the rest is padding"""
    self.weights: np.ndarray | None = None
    """of the loss of the id after each, if there are examples"""
    self.reference: np.ndarray | None = None
    """log-probabilities of the targets under a reference, if the layouts have a column of them"""
    self.has_examples = np.zeros(count, bool)
    """rows whose pieces are examples, in which a separator may be any token"""

  def fill(self, layout: Layout, slots: np.ndarray, rows: np.ndarray, draws: np.ndarray) -> None:
    """Writes rows [n] of an epoch of a layout to `slots` [n]; `draws` as in Layout.pieces."""
    positions, lengths, pieces = layout.pieces(rows, draws)
    columns, firsts = np.cumsum(lengths) - lengths, np.cumsum(pieces) - pieces
    places = columns + np.repeat(slots * self.ids.shape[1] - columns[firsts], pieces)
    # Each piece is read with the id after it, its last target, which the next piece of the row overwrites.
    layout.store.read(positions, lengths + 1, self.ids.reshape(-1), places)
    self.starts.reshape(-1)[places] = True
    self.lengths[slots] = np.add.reduceat(lengths, firsts)
    if layout.store.weighted:
      if self.weights is None:
        self.weights = np.ones(self.ids.shape, np.float32)
      layout.store.read(positions, lengths, self.weights.reshape(-1), places, field='weight')
      self.has_examples[slots] = True
    if isinstance(layout, Packed) and layout.column is not None:
      if self.reference is None:
        self.reference = np.zeros((len(self.ids), self.ids.shape[1] - 1), np.float32)
      self.reference[slots] = layout.column.read(rows)

  def batch(self, isolate_documents: bool) -> Batch:
    """The model's inputs. Padding has segment 0, mask 0 and an arbitrary id."""
    tokens, targets = self.ids[:, :-1].copy(), self.ids[:, 1:].copy()
    padded = np.flatnonzero(self.lengths < tokens.shape[1])
    tokens[padded, self.lengths[padded]] = 0  # the last target
    targets[self.starts[:, 1:]] = self.separator  # overwritten by the next piece
    real = np.arange(tokens.shape[1]) < self.lengths[:, None]
    # In documents, a separator starts a document, and is no target if documents have an end of their own.
    separator = np.where(self.has_examples, -1, self.separator)[:, None] if self.weights is not None else self.separator
    masked = real & (targets != separator) if self.end != self.separator else real
    mask = masked.astype(np.float32)
    if self.weights is not None:
      mask *= np.maximum(self.weights[:, :-1], 0)
      self.starts[:, 1:] |= self.weights[:, :-1] == PART_END
    batch = {'tokens': tokens, 'targets': targets, 'mask': mask}
    if self.reference is not None:
      batch['reference'] = self.reference
    if isolate_documents:
      # Each row starts a segment, so all rows can be treated as one sequence of segments.
      starts = np.flatnonzero(self.starts[:, :-1] | (tokens == separator))
      rows, lengths = starts // tokens.shape[1], np.diff(starts, append=tokens.size)
      numbers = np.arange(1, len(starts) + 1) - np.searchsorted(rows, rows)
      segments = np.repeat(numbers.astype(np.int32), lengths).reshape(tokens.shape)
      segments[padded] *= real[padded]
      positions = np.arange(tokens.size, dtype=np.int32)
      positions -= np.repeat(starts.astype(np.int32), lengths)
      batch |= {'positions': positions.reshape(tokens.shape), 'segments': segments}
    return batch


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
  """Images of `indices` [n] under pseudo-random permutations of range(size), one for each key [n], without a table.

  A Feistel network over pairs of numbers below a and b permutes range(a * b), slightly more than `size`. Images outside
  range(size) are permuted again until they are inside (cycle walking; Black and Rogaway 2002, sections 4 and 5).
  """
  a = np.uint64(math.isqrt(size - 1) + 1)
  b = np.uint64(-(-size // int(a)))
  round_keys = mix(keys + np.arange(2, 2 + _ROUNDS, dtype=np.uint64)[:, None])
  images = _feistel(indices.astype(np.uint64), a, b, round_keys)
  while (outside := images >= size).any():
    images[outside] = _feistel(images[outside], a, b, round_keys[:, outside])
  return images.astype(np.int64)


def _feistel(numbers: np.ndarray, a: np.uint64, b: np.uint64, round_keys: np.ndarray) -> np.ndarray:
  left, right = np.divmod(numbers, b)
  for number in range(0, _ROUNDS, 2):
    left = (left + mix(right + round_keys[number]) % a) % a
    right = (right + mix(left + round_keys[number + 1]) % b) % b
  return left * b + right


def mix(x: np.ndarray) -> np.ndarray:
  """A bijective hash of uint64 (splitmix64's output function, Steele et al. 2014)."""
  x = x + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
  return x ^ x >> np.uint64(31)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainRows:
  """An endless sequence of rows over a mixture. A hash of (seed, component, epoch) draws the order of a component in an epoch."""

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

    targets are tokens shifted by one; positions count from the start of the document or of the row, whichever is later; segments
    number the documents of a row from 1; mask is 0 for padding and where there is no target. Raises a UserError if a row is beyond
    the mixture's last, or a store is damaged.
    """
    frame = Frame(len(rows), self.context, self.layouts[0].store)
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
  """Non-overlapping windows over a store, in order; the last one is padded. Examples are packed, each in one piece, with a plan that is
  cached in `cache_dir`."""

  def __init__(self, store: TokenStore, context: int, isolate_documents: bool, cache_dir: Path | None = None, cut: bool = False):
    assert cache_dir or not store.weighted
    layout = Packed(store, context, 'pack', cache_dir, cut) if store.weighted and cache_dir else Windows(store, context)
    self._set(layout, isolate_documents or store.weighted)

  @classmethod
  def of(cls, layout: 'Layout', isolate_documents: bool) -> 'EvalRows':
    """The rows of a layout, in order."""
    rows = cls.__new__(cls)
    rows._set(layout, isolate_documents)
    return rows

  def _set(self, layout: 'Layout', isolate_documents: bool) -> None:
    self.layout, self.store, self.context, self.isolate_documents = layout, layout.store, layout.context, isolate_documents
    self.count = layout.count

  def spaced(self, count: int) -> np.ndarray:
    """Indices of `count` rows, evenly spaced; 0: of all."""
    return np.arange(self.count) if not 0 < count < self.count else np.arange(count) * self.count // count

  def batch(self, rows: np.ndarray) -> Batch:
    """Rows at indices [n] as in TrainRows.batch; those from `count` on are padding, to fill the last batch."""
    rows = np.asarray(rows, np.int64)
    frame = Frame(len(rows), self.context, self.store)
    slots = np.flatnonzero(rows < self.count)
    frame.fill(self.layout, slots, rows[slots], np.zeros(len(slots), np.uint64))
    return frame.batch(self.isolate_documents)


def _start_worker(_index: int, _count: int) -> None:
  for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and Slurm also send them to workers, which the run needs to end cleanly
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=end_with_parent, daemon=True).start()


def batches(rows: TrainRows, first_row: int, batch_size: int, local_rows: np.ndarray, *, prefetch: int,
            workers: int) -> Generator[Batch, None, None]:
  """Yields the batches of a run without end, from a row on; the generator must be closed to end its threads and processes.

  `local_rows` [n] are the rows of each batch, from 0 to batch_size - 1, that this process needs. `prefetch` batches are prepared
  ahead (0: on request), in `workers` processes (0: in a thread).
  """
  import grain  # imports JAX, which takes seconds and which tools do not need
  # Elements are batches and not rows, because with rows Grain was 20 times slower (64 x 1,024 tokens: 6 against 137 million tokens/s
  # on 2 cores). A dataset must have a length.
  dataset = grain.MapDataset.range(2**62).map(lambda step: rows.batch(first_row + step * batch_size + local_rows))
  if workers:
    from absl import flags
    flags.FLAGS.mark_as_parsed()  # Grain passes flags to its workers, and requires that they are parsed
    each = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-prefetch // workers))
    iterator = iter(each.mp_prefetch(options, worker_init_fn=_start_worker))
  else:
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch)))
  try:
    yield from iterator
  finally:
    with contextlib.suppress(AttributeError):  # raised by Grain if a worker failed before all had started
      iterator.close()
