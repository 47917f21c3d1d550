"""Packing: which pieces of documents make up each row, computed once per store and stored as an index on disk."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptjax.config import UserError
from gptjax.data.folders import LocalFolder
from gptjax.data.progress import ProgressBar
from gptjax.data.store import TokenStore
from gptjax.files import atomic_directory, write_atomic

GROUP = 65_536
"""Documents that are packed together: enough for dense rows, few enough to be packed in seconds."""

_PIECE = np.dtype([('position', '<i8'), ('length', '<i8')])


class Packed:
  """Rows of complete documents; those longer than `context`, the maximum tokens per row, are cut into full rows and a remainder.

  The kind is 'pack', a best fit of documents and remainders, or 'document', one piece per row. The pieces of each row are an index in
  `cache_dir/plans`, made first if necessary; only the needed entries are read.
  """

  def __init__(self, store: TokenStore, context: int, kind: str, cache_dir: Path):
    self.store = store
    self._arguments = store, context, kind, cache_dir
    directory = cache_dir / 'plans' / f'{store.sha256[:16]}-{kind}-{context}'
    with atomic_directory(directory) as folder:
      if folder:
        _write(folder, store, context, best_fit if kind == 'pack' else lambda lengths, _: [[piece] for piece in range(len(lengths))])
    self._folder = LocalFolder(str(directory))
    self.count: int = json.loads(self._folder.read('plan.json'))['rows']
    self.padding = 1 - store.tokens / (self.count * context)
    """fraction of positions that are padding"""

  def __reduce__(self):
    return Packed, self._arguments  # without memory maps

  def pieces(self, rows: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """See gptjax.data.rows.Layout."""
    self._folder.count_touched(2 * len(rows), 0)
    bounds, table = self._folder.mapped('rows.bin').view('<i8'), self._folder.mapped('pieces.bin').view(_PIECE)
    counts = bounds[rows + 1] - bounds[rows]
    found = table[np.repeat(bounds[rows] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())]
    return found['position'], found['length'], counts


def _write(folder: Path, store: TokenStore, context: int, pack: Callable[[np.ndarray, int], list[list[int]]]) -> None:
  rows = pieces = tokens = 0
  with (folder / 'rows.bin').open('wb') as bounds, (folder / 'pieces.bin').open('wb') as file, \
      ProgressBar(f'packing rows of {context:,} tokens', store.documents, 'documents') as progress:
    bounds.write(np.zeros(1, '<i8').tobytes())
    for documents, group in _groups(store, context):
      packed = pack(group['length'], context)
      counts = np.array([len(row) for row in packed])
      bounds.write((pieces + np.cumsum(counts)).astype('<i8').tobytes())
      file.write(group[np.concatenate(packed)].tobytes())
      rows, pieces, tokens = rows + len(packed), pieces + len(group), tokens + int(group['length'].sum())
      progress.advance(documents)
  if tokens != store.tokens:
    raise UserError(store.location, f'documents of {tokens:,} tokens', f'{store.tokens:,}, as in its manifest; prepare it again')
  write_atomic(folder / 'plan.json', json.dumps({'rows': rows, 'pieces': pieces}) + '\n')


def _groups(store: TokenStore, context: int) -> Iterator[tuple[int, np.ndarray]]:
  """Yields the number of documents and the pieces of each group, in stream order."""
  for first in range(0, store.documents, GROUP):
    starts = store.starts(first, min(first + GROUP, store.documents))
    lengths = np.diff(starts)
    counts = -(-lengths // context)
    pieces = np.empty(counts.sum(), _PIECE)
    within = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces['position'] = np.repeat(starts[:-1], counts) + within * context
    pieces['length'] = np.minimum(np.repeat(starts[1:], counts) - pieces['position'], context)
    yield len(lengths), pieces


def best_fit(lengths: np.ndarray, context: int) -> list[list[int]]:
  """Best-fit decreasing bin packing (Johnson 1974; for pretraining: arXiv:2404.10830); returns the indices of each row's pieces.

  Places pieces of 1 to `context` tokens, longest first, each in the row that it leaves the least space in.
  """
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
