"""Tokenizing: from a source to a token store, and on from the last finished shard after a kill."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gptjax.config import UserError
from gptjax.data.encoding import TOLD, Encoded, Recipe, encoded, tasks_of
from gptjax.data.journal import Journal, Progress
from gptjax.data.progress import Work, announce
from gptjax.data.sources import Part, Source, refuse
from gptjax.data.store import MANIFEST, TokenStore, shard_name
from gptjax.data.store_writer import ShardRecord, ShardWriter, finish_store, id_dtype
from gptjax.files import atomic_directory

_JOURNAL = 'journal.db'


def write_store(directory: Path, recipe: Recipe, *, processes: int = 1, title: str = 'tokenizing') -> TokenStore:
  """Makes a store, or goes on where a killed process left one.

  A shard's end is committed together with the digests of its documents; what came after it is done again.

  Args:
    directory: of the store; it appears when it is whole. One that is there of the same recipe is left as it is.
    recipe: what it is made of.
    processes: that tokenize; what they hold in memory does not depend on the size of the source.
    title: what the progress bar calls the work.

  Raises:
    UserError: too many malformed records (the first is named), a text that cannot be encoded, no document is left, or a
      store of another recipe lies there, whole or begun. Finished shards, if there are any, stay for a call that comes after.
  """
  with atomic_directory(directory, lambda folder: any(folder.glob('*.shard'))) as folder:
    if folder:
      _build(folder, recipe, processes, title)
  store = TokenStore.open(directory)
  if store.manifest.get('fingerprint') != recipe.fingerprint():
    raise UserError('--out', str(directory), 'another folder: this one holds a store of another source, tokenizer or filter')
  return store


def _build(folder: Path, recipe: Recipe, processes: int, title: str) -> None:
  if (folder / MANIFEST).exists():  # it comes last: only the folder's name was missing
    if TokenStore.open(folder).manifest.get('fingerprint') == recipe.fingerprint():
      _forget(folder)
      return
    (folder / MANIFEST).unlink()
  dtype = id_dtype(recipe.tokenizer.vocab_size)
  with Journal(folder / _JOURNAL, recipe.fingerprint()) as journal:
    shards = [ShardRecord(**shard) for shard in journal.progress.shards]
    paths = [folder / shard_name(number) for number in range(len(shards))]
    if not all(path.exists() and path.stat().st_size == shard.size(dtype) for path, shard in zip(paths, shards)):
      announce(f'{folder}: finished shards are missing; started anew')
      journal.reset()
    progress = journal.progress
    if progress.tasks:
      announce(f'{folder}: going on after {len(progress.shards)} finished shards')
    for path in (*folder.glob('*.shard'), *folder.glob('*.partial')):  # begun, or finished just before the kill
      if path.suffix == '.partial' or int(path.stem) >= len(progress.shards):
        path.unlink()
    with Work(title, recipe.source.size, 'bytes', progress.source_bytes) as work:
      tasks = itertools.islice(tasks_of(recipe.source.parts()), progress.tasks, None)
      with contextlib.closing(encoded(tasks, recipe, processes)) as results:
        _Writer(folder, recipe, journal, work).write(results)
    shards = [ShardRecord(**shard) for shard in progress.shards]
    if not shards:
      raise UserError('source', recipe.source.description, f'documents; of {progress.records:,} records none is left, and dropped were '
                      f'{progress.dropped}')
  finish_store(folder, recipe.tokenizer, shards, {
    'source': recipe.source.description, 'records': progress.records, 'malformed': progress.malformed,
    'malformed_first': progress.malformed_first,
    'dropped': progress.dropped, 'filters': dataclasses.asdict(recipe.filters), 'deduplicated': recipe.deduplicate,
    'decontaminated': recipe.contamination.names if recipe.contamination else [], 'fingerprint': recipe.fingerprint()})
  _forget(folder)


def _forget(folder: Path) -> None:
  for path in folder.glob(f'{_JOURNAL}*'):  # with what SQLite leaves beside it in a killed process
    path.unlink()


class _Writer:
  """The one process that writes: what the others encoded arrives in the order of the source."""

  def __init__(self, folder: Path, recipe: Recipe, journal: 'Journal', work: Work):
    self._folder, self._recipe, self._journal, self._work = folder, recipe, journal, work
    self._shard: ShardWriter | None = None

  def write(self, tasks: Iterable[tuple[list[Part], Encoded]]) -> None:
    """Writes shard after shard."""
    progress = self._journal.progress
    try:
      for parts, found in tasks:
        self._count(parts, found)
        if self._recipe.deduplicate:
          _keep(found, self._journal.new(found.digests), 'duplicate')
        if len(found.lengths):
          self._shard = self._shard or ShardWriter(self._folder, len(progress.shards))
          self._shard.append(found.ids, found.lengths, int(found.sizes.sum()))
        progress.dropped = dict(sorted((collections.Counter(progress.dropped) + found.dropped).items()))
        if self._shard and self._shard.tokens >= self._recipe.shard_tokens:
          self._close()
        self._work.advance(sum(part.size for part in parts))
      _check_malformed(self._recipe.source, progress, final=True)
      if self._shard:
        self._close()
    finally:
      if self._shard:
        self._shard.abort()

  def _close(self) -> None:
    assert self._shard
    self._journal.progress.shards.append(dataclasses.asdict(self._shard.close()))
    self._journal.commit()
    self._shard = None

  def _count(self, parts: list[Part], found: Encoded) -> None:
    """Counts records, and names the first malformed ones by their place in the file."""
    progress, source = self._journal.progress, self._recipe.source
    told = collections.defaultdict(list)
    for index, malformed in found.malformed:
      told[index].append(malformed)
    for index, (part, records) in enumerate(zip(parts, found.records)):
      if part.file != progress.file:
        progress.file, progress.file_records = part.file, 0
      for malformed in told[index]:
        error = refuse(source, part, malformed, progress.file_records)
        if not source.skip:
          raise error
        if len(progress.malformed_first) < TOLD:
          progress.malformed_first.append(str(error))
          announce(f'left out: {error}')
      progress.file_records += records
    progress.records += sum(found.records)
    progress.malformed += found.malformed_count
    progress.tasks += 1
    progress.source_bytes += sum(part.size for part in parts)
    _check_malformed(source, progress, final=False)


def _check_malformed(source: Source, progress: Progress, *, final: bool) -> None:
  # A few at the start are no rate yet.
  if progress.malformed > source.skip * progress.records and (final or progress.records >= 10_000):
    raise UserError('source.skip', source.skip, f'a share above the {progress.malformed:,} malformed of {progress.records:,} records, '
                    'or a source without them')


def _keep(found: Encoded, kept: np.ndarray, reason: str) -> None:
  """Drops the documents that are not marked in `kept` [documents]."""
  if kept.all():
    return
  found.dropped[reason] += int((~kept).sum())
  found.ids = found.ids[np.repeat(kept, found.lengths)]
  found.lengths, found.sizes = found.lengths[kept], found.sizes[kept]
