"""Plans: which pieces of documents make a row, computed once for a store and kept as an index on disk."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptjax.config import UserError
from gptjax.data.folders import LocalFolder
from gptjax.data.progress import Work
from gptjax.data.store import TokenStore
from gptjax.files import atomic_directory, write_atomic

GROUP = 65_536
"""Documents that are packed together: enough for dense rows, few enough to be planned in seconds."""

_PIECE = np.dtype([('place', '<i8'), ('length', '<i8')])


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """Rows of pieces; a piece is a stretch of the stream inside one document. A few numbers are read for a row, no table."""

  directory: Path
  rows: int
  tokens: int
  """of all pieces: those of the store"""
  context: int
  """most tokens of a row"""

  @property
  def padding(self) -> float:
    """Share of the rows' places that no token fills."""
    return 1 - self.tokens / (self.rows * self.context)

  @functools.cached_property
  def _folder(self) -> LocalFolder:
    return LocalFolder(str(self.directory))

  def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces of rows [n]: places and lengths [all pieces], one row after another, and how many pieces each row has [n]."""
    bounds = [data.view('<i8') for data in self._folder.ranges([('rows.bin', 8 * row, 8 * row + 16) for row in rows.tolist()])]
    size = _PIECE.itemsize
    found = self._folder.ranges([('pieces.bin', size * int(first), size * int(stop)) for first, stop in bounds])
    pieces = np.concatenate(found).view(_PIECE)
    return pieces['place'].copy(), pieces['length'].copy(), np.array([stop - first for first, stop in bounds])

  def __reduce__(self):
    return Plan, (self.directory, self.rows, self.tokens, self.context)


def plan(store: TokenStore, context: int, layout: str, cache_dir: Path) -> Plan:
  """Finds the plan of a store in the cache, or computes it there.

  A document longer than the context is cut into full rows and a tail.

  Args:
    store: the tokens.
    context: T, most tokens of a row.
    layout: 'pack', best fit of whole documents and tails; or 'document', each document or piece a row of its own.
    cache_dir: the plan lies in `cache_dir/plans`.
  """
  directory = Path(cache_dir) / 'plans' / f'{store.sha256[:16]}-{layout}-{context}'
  with atomic_directory(directory) as folder:
    if folder:
      _write(folder, store, context, best_fit if layout == 'pack' else _alone)
  facts = json.loads((directory / 'plan.json').read_text())
  return Plan(directory, facts['rows'], store.tokens, context)


def _write(folder: Path, store: TokenStore, context: int, fit: Callable[[np.ndarray, int], list[list[int]]]) -> None:
  rows = pieces = tokens = 0
  with (folder / 'rows.bin').open('wb') as bounds, (folder / 'pieces.bin').open('wb') as file, \
      Work(f'planning rows of {context:,} tokens', store.documents, 'documents') as work:
    bounds.write(np.zeros(1, '<i8').tobytes())
    for documents, group in _groups(store, context):
      packed = fit(group['length'], context)
      counts = np.array([len(row) for row in packed])
      bounds.write((pieces + np.cumsum(counts)).astype('<i8').tobytes())
      file.write(group[np.concatenate(packed)].tobytes())
      rows, pieces, tokens = rows + len(packed), pieces + len(group), tokens + int(group['length'].sum())
      work.advance(documents)
  if tokens != store.tokens:
    raise UserError(f'{store.place}', f'documents of {tokens:,} tokens', f'{store.tokens:,}, as its manifest says; prepare it again')
  write_atomic(folder / 'plan.json', json.dumps({'rows': rows, 'pieces': pieces}) + '\n')


def _groups(store: TokenStore, context: int) -> Iterator[tuple[int, np.ndarray]]:
  """Documents and pieces of each group of documents, in the order of the stream."""
  for first in range(0, store.documents, GROUP):
    starts = store.starts(first, min(first + GROUP, store.documents))
    lengths = np.diff(starts)
    counts = -(-lengths // context)
    pieces = np.empty(counts.sum(), _PIECE)
    within = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces['place'] = np.repeat(starts[:-1], counts) + within * context
    pieces['length'] = np.minimum(np.repeat(starts[1:], counts) - pieces['place'], context)
    yield len(lengths), pieces


def best_fit(lengths: np.ndarray, context: int) -> list[list[int]]:
  """Best-fit decreasing bin packing (Johnson 1974; for pretraining: arXiv:2404.10830): the longest piece first, each into
  the row that it leaves the least space in.

  Args:
    lengths: of the pieces, 1 to `context`.
    context: size of a row.

  Returns:
    Indices of the pieces of each row.
  """
  context = min(context, int(lengths.sum()))  # no row holds more, and there is a list for each space
  rows: list[list[int]] = []
  with_space: list[list[list[int]]] = [[] for _ in range(context + 1)]
  spaces = 0  # bit s is set where some row has space s left
  sizes = lengths.tolist()
  for piece in np.argsort(-lengths, kind='stable').tolist():
    length = sizes[piece]
    fitting = spaces >> length
    if fitting:
      space = (fitting & -fitting).bit_length() - 1 + length
      row = with_space[space].pop()
      if not with_space[space]:
        spaces ^= 1 << space
      row.append(piece)
    else:
      space, row = context, [piece]
      rows.append(row)
    left = space - length
    if left:
      with_space[left].append(row)
      spaces |= 1 << left
  return rows


def _alone(lengths: np.ndarray, context: int) -> list[list[int]]:
  return [[piece] for piece in range(len(lengths))]
