"""Tokenizing: a source becomes a token store; an interrupted build resumes after its last finished shard."""

import collections
import contextlib
import dataclasses
import itertools
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gptjax.config import UserError
from gptjax.data.encoding import MAX_REPORTED, Encoded, Recipe, encode_tasks, tasks_of
from gptjax.data.progress import ProgressBar, announce
from gptjax.data.sources import Part, Source, malformed_error
from gptjax.data.store import MANIFEST, ShardRecord, ShardWriter, TokenStore, finish_store, id_dtype, shard_name
from gptjax.files import atomic_directory

_JOURNAL = 'journal.db'


def write_store(directory: Path, recipe: Recipe, *, processes: int = 1, title: str = 'tokenizing') -> TokenStore:
  """Makes a store, or resumes an interrupted build.

  The folder appears when the store is complete; a store of the same recipe is left unchanged. Memory does not depend on the size of
  the source. Raises a UserError if too many records are malformed (the error names the first), a text cannot be encoded, no
  documents remain, or the folder has a complete or unfinished store of another recipe. Finished shards are kept for a later call.
  """
  with atomic_directory(directory, lambda folder: any(folder.glob('*.shard'))) as folder:
    if folder:
      try:
        _build(folder, recipe, processes, title)
      except sqlite3.Error as error:  # for example, a full disk
        raise OSError(0, str(error), str(folder / _JOURNAL)) from None
  store = TokenStore.open(directory)
  if store.manifest.get('fingerprint') != recipe.fingerprint():
    raise UserError('--out', str(directory), 'another folder: this one has a store of another source, tokenizer or filter')
  return store


def _build(folder: Path, recipe: Recipe, processes: int, title: str) -> None:
  # The manifest is written last: if it is there, only renaming the folder was missing.
  if not (folder / MANIFEST).exists() or TokenStore.open(folder).manifest.get('fingerprint') != recipe.fingerprint():
    (folder / MANIFEST).unlink(missing_ok=True)
    with contextlib.closing(Journal(folder / _JOURNAL, recipe.fingerprint())) as journal:
      _remove_unfinished(folder, journal, id_dtype(recipe.tokenizer.vocab_size))
      state = journal.state
      with ProgressBar(title, recipe.source.size, 'bytes', state.source_bytes) as progress:
        tasks = itertools.islice(tasks_of(recipe.source.parts()), state.tasks, None)
        with contextlib.closing(encode_tasks(tasks, recipe, processes)) as results:
          _write_shards(folder, recipe, journal, results, progress)
      if not state.shards:
        raise UserError('source', recipe.source.description, f'documents; none of its {state.records:,} records is left, dropped were '
                        f'{state.dropped}')
    finish_store(folder, recipe.tokenizer, state.shards, {
      'source': recipe.source.description, 'records': state.records, 'malformed': state.malformed,
      'malformed_first': state.malformed_first, 'dropped': state.dropped, 'filters': dataclasses.asdict(recipe.filters),
      'deduplicated': recipe.deduplicate, 'decontaminated': recipe.contamination.names if recipe.contamination else [],
      'fingerprint': recipe.fingerprint()})
  for path in folder.glob(f'{_JOURNAL}*'):  # including files that SQLite leaves beside it in a killed process
    path.unlink()


def _remove_unfinished(folder: Path, journal: 'Journal', dtype: np.dtype) -> None:
  """Removes shards that the journal does not list, or all if one that it lists is missing."""
  shards = journal.state.shards
  paths = [folder / shard_name(number) for number in range(len(shards))]
  if not all(path.exists() and path.stat().st_size == shard.size(dtype) for path, shard in zip(paths, shards)):
    announce(f'{folder}: finished shards are missing; starting over')
    journal.reset()
    paths = []
  if paths:
    announce(f'{folder}: resuming after {len(paths)} finished shards')
  for path in {*folder.glob('*.shard'), *folder.glob('*.partial')} - {*paths}:
    path.unlink()


@dataclasses.dataclass
class BuildState:
  """Everything needed to resume after a finished shard."""

  tasks: int = 0
  source_bytes: int = 0
  records: int = 0
  malformed: int = 0
  malformed_first: list[str] = dataclasses.field(default_factory=list)
  file: str = ''
  file_records: int = 0
  """records of `file` so far"""
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  shards: list[ShardRecord] = dataclasses.field(default_factory=list)


class Journal:
  """A database beside the shards, with the state and, for deduplication, a digest of every document.

  Each shard is one transaction, so that a killed process leaves the state after the last finished shard. A damaged database is
  replaced. Raises a UserError if there are finished shards of another recipe.
  """

  def __init__(self, path: Path, fingerprint: str):
    self._fingerprint = fingerprint
    try:
      self._open(path)
    except sqlite3.OperationalError:
      raise
    except sqlite3.DatabaseError:
      announce(f'{path}: damaged; starting over')
      self._database.close()
      path.unlink()
      self._open(path)
    saved, state = self._database.execute('select fingerprint, state from progress').fetchone() or ('', '{}')
    self.state = BuildState(**json.loads(state))
    self.state.shards = [ShardRecord(*shard) for shard in self.state.shards]
    if saved != fingerprint:
      if self.state.shards:
        self.close()
        raise UserError('--out', str(path.parent), f'the arguments of its {len(self.state.shards)} finished shards, or another folder: '
                        'source, tokenizer, filters or shard size differ')
      self.reset()

  def close(self) -> None:
    """Closes the database; uncommitted changes are lost."""
    self._database.close()

  def reset(self) -> None:
    """Discards the state permanently; to be called before its files are removed."""
    self.state = BuildState()
    self._database.execute('delete from digests')
    self._database.execute('delete from progress')
    self._database.execute('insert into progress values (?, ?)', (self._fingerprint, '{}'))
    self.commit()

  def is_new(self, digest: bytes) -> bool:
    """Whether no document had this digest before; it is added."""
    return self._database.execute('insert or ignore into digests values (?)', (digest,)).rowcount == 1

  def commit(self) -> None:
    """Saves the state and the digests added so far."""
    self._database.execute('update progress set state = ?', (json.dumps(dataclasses.asdict(self.state)),))
    self._database.commit()

  def _open(self, path: Path) -> None:
    self._database = sqlite3.connect(path)
    self._database.execute('pragma cache_size = -100000')  # kB; the rest stays on disk
    self._database.execute('create table if not exists progress (fingerprint text, state text)')
    self._database.execute('create table if not exists digests (digest blob primary key) without rowid')


def _write_shards(folder: Path, recipe: Recipe, journal: Journal, tasks: Iterable[tuple[list[Part], Encoded]],
                  progress: ProgressBar) -> None:
  """Writes encoded tasks, which arrive in the order of the source, to shards."""
  state = journal.state
  shard: ShardWriter | None = None

  def close(finished: ShardWriter) -> None:
    state.shards.append(finished.close())
    journal.commit()

  try:
    for parts, encoded in tasks:
      _count(state, recipe.source, parts, encoded)
      documents = encoded.documents
      if recipe.deduplicate:
        documents = [document for document in documents if journal.is_new(document[-1])]
        encoded.dropped['duplicate'] += len(encoded.documents) - len(documents)
      if documents:
        shard = shard or ShardWriter(folder, len(state.shards), id_dtype(recipe.tokenizer.vocab_size))
        shard.append([ids for ids, _, _ in documents], sum(size for _, size, _ in documents))
      state.dropped = dict(sorted((collections.Counter(state.dropped) + encoded.dropped).items()))
      if shard and shard.tokens >= recipe.shard_tokens:
        close(shard)
        shard = None
      progress.advance(sum(part.size for part in parts))
    _check_malformed(state, recipe.source.skip)
    if shard:
      close(shard)
      shard = None
  finally:
    if shard:
      shard.abort()


def _count(state: BuildState, source: Source, parts: list[Part], encoded: Encoded) -> None:
  """Updates the state, and reports the first malformed records with their position in the file."""
  for index, (part, records) in enumerate(zip(parts, encoded.records)):
    if part.file != state.file:
      state.file, state.file_records = part.file, 0
    for error in (malformed_error(source, part, malformed, state.file_records) for i, malformed in encoded.malformed if i == index):
      if not source.skip:
        raise error
      if len(state.malformed_first) < MAX_REPORTED:
        state.malformed_first.append(str(error))
        announce(f'skipped: {error}')
    state.file_records += records
  state.records += sum(encoded.records)
  state.malformed += encoded.malformed_count
  state.tasks += 1
  state.source_bytes += sum(part.size for part in parts)
  if state.records >= 10_000:  # fewer do not give a meaningful fraction
    _check_malformed(state, source.skip)


def _check_malformed(state: BuildState, skip: float) -> None:
  if state.malformed > skip * state.records:
    raise UserError('source.skip', skip, f'a fraction above the {state.malformed:,} malformed of {state.records:,} records, '
                    'or a source without them')
