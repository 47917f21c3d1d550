"""Tokenizing: from a source to a token store, over processes, and on from the last finished shard after a kill."""

import collections
import concurrent.futures.process
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.filters import Contamination, Filters
from gptjax.data.progress import Work, announce
from gptjax.data.sources import Malformed, Part, Source, refuse
from gptjax.data.store import MANIFEST, VERSION, TokenStore, shard_name
from gptjax.data.store_writer import ShardRecord, ShardWriter, finish_store, id_dtype
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.files import building

_TASK = 2**22
"""Bytes of a source that a process is given at once; small parts go together."""

_TOLD = 20
"""Malformed records that are named; the others are counted."""


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a store is made of; equal recipes make stores that are equal to the last byte, over any number of processes."""

  source: Source
  tokenizer: Tokenizer
  filters: Filters = Filters()
  contamination: Contamination | None = None
  deduplicate: bool = False
  """drop documents whose text was there before"""
  shard_tokens: int = 2**28
  """a shard ends with the first task after so many ids"""

  def fingerprint(self) -> str:
    """Hex digest of all of it, the source by names, sizes and times of change."""
    # Not its skip: what is left out is counted over the whole source in the end, and a higher one may go on.
    parts = [VERSION, _TASK, self.source.part_bytes, self.source.fingerprint(), self.tokenizer.sha256, dataclasses.asdict(self.filters),
             self.contamination.sha256 if self.contamination else '', self.deduplicate, self.shard_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclasses.dataclass
class Encoded:
  """Some parts of a source, tokenized."""

  ids: np.ndarray
  """of all documents, each after a separator"""
  lengths: np.ndarray
  """[documents] ids of each, its separator included"""
  sizes: np.ndarray
  """[documents] UTF-8 bytes"""
  digests: list[bytes]
  """of the texts, 128 bits each"""
  dropped: collections.Counter[str]
  """documents that were left out, by reason"""
  records: list[int]
  """records of each part"""
  malformed: list[tuple[int, Malformed]]
  """the first few, each with the index of its part"""
  malformed_count: int


@dataclasses.dataclass
class _Progress:
  """Where a store stands: all that a process needs to go on from a shard's end."""

  tasks: int = 0
  source_bytes: int = 0
  records: int = 0
  malformed: int = 0
  malformed_first: list[str] = dataclasses.field(default_factory=list)
  file: str = ''
  file_records: int = 0
  """records of `file` so far"""
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)


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
      store of another recipe lies there. Finished shards, if there are any, stay for a call that comes after.
  """
  with building(directory, lambda folder: any(folder.glob('*.shard'))) as folder:
    if folder:
      _build(folder, recipe, processes, title)
  store = TokenStore.open(directory)
  if store.manifest.get('fingerprint') != recipe.fingerprint():
    raise UserError('--out', str(directory), 'another folder: this one holds a store of another source, tokenizer or filter')
  return store


def _build(folder: Path, recipe: Recipe, processes: int, title: str) -> None:
  if (folder / MANIFEST).exists():  # it comes last: only the folder's name was missing
    if TokenStore.open(folder).manifest.get('fingerprint') == recipe.fingerprint():
      return
    (folder / MANIFEST).unlink()
  dtype = id_dtype(recipe.tokenizer.vocab_size)
  with _Journal(folder / 'journal.db', recipe.fingerprint()) as journal:
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
    recipe.tokenizer.save(folder / 'tokenizer')
    with Work(title, recipe.source.size, 'bytes', progress.source_bytes) as work:
      tasks = _skip(_tasks(recipe.source.parts()), progress.tasks)
      _Writer(folder, recipe, journal, work).write(_encoded(tasks, recipe, folder / 'tokenizer', processes))
    shards = [ShardRecord(**shard) for shard in progress.shards]
    if not shards:
      raise UserError('source', recipe.source.description, f'documents; of {progress.records:,} records none is left, and dropped were '
                      f'{progress.dropped}')
  finish_store(folder, recipe.tokenizer, shards, {
    'source': recipe.source.description, 'records': progress.records, 'malformed': progress.malformed,
    'malformed_first': progress.malformed_first,
    'dropped': progress.dropped, 'filters': dataclasses.asdict(recipe.filters), 'deduplicated': recipe.deduplicate,
    'decontaminated': recipe.contamination.names if recipe.contamination else [], 'fingerprint': recipe.fingerprint()})
  (folder / 'journal.db').unlink()


class _Writer:
  """The one process that writes: what the others encoded arrives in the order of the source."""

  def __init__(self, folder: Path, recipe: Recipe, journal: '_Journal', work: Work):
    self._folder, self._recipe, self._journal, self._work = folder, recipe, journal, work
    self._shard: ShardWriter | None = None

  def write(self, encoded: Iterable[tuple[list[Part], Encoded]]) -> None:
    """Writes shard after shard."""
    progress = self._journal.progress
    try:
      for parts, found in encoded:
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
        if len(progress.malformed_first) < _TOLD:
          progress.malformed_first.append(str(error))
          announce(f'left out: {error}')
      progress.file_records += records
    progress.records += sum(found.records)
    progress.malformed += found.malformed_count
    progress.tasks += 1
    progress.source_bytes += sum(part.size for part in parts)
    _check_malformed(source, progress, final=False)


def _check_malformed(source: Source, progress: _Progress, *, final: bool) -> None:
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


def _tasks(parts: Iterable[Part]) -> Iterator[list[Part]]:
  """Parts in groups of some megabytes."""
  task: list[Part] = []
  size = 0
  for part in parts:
    task.append(part)
    size += max(part.size, len(part.payload))  # a part of a compressed file takes up less there than here
    if size >= _TASK:
      yield task
      task, size = [], 0
  if task:
    yield task


def _skip(tasks: Iterator[list[Part]], count: int) -> Iterator[list[Part]]:
  return (task for number, task in enumerate(tasks) if number >= count)


# What a worker process keeps from task to task.
_worker: dict[str, Callable[[list[Part]], Encoded]] = {}


def _encoded(tasks: Iterator[list[Part]], recipe: Recipe, tokenizer: Path, processes: int) -> Iterator[tuple[list[Part], Encoded]]:
  """Encodes tasks over processes; results come in the order of the tasks, and only some tasks are under way at a time."""
  ahead = [task for _, task in zip(range(2), tasks)]
  if processes == 1 or len(ahead) < 2:  # starting a process takes longer than a task
    encode = _encoder(recipe, recipe.tokenizer)
    yield from ((task, encode(task)) for task in itertools.chain(ahead, tasks))
    return
  context = multiprocessing.get_context('spawn')  # a fork of a process with threads may hang
  arguments = (recipe.source, tokenizer, recipe.filters, recipe.contamination, recipe.deduplicate)
  pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, arguments)
  waiting: collections.deque[tuple[list[Part], concurrent.futures.Future]] = collections.deque()
  try:
    for task in itertools.chain(ahead, tasks):
      waiting.append((task, pool.submit(_encode_in_worker, task)))
      if len(waiting) > 2 * processes:
        done, future = waiting.popleft()
        yield done, future.result()
    for done, future in waiting:
      yield done, future.result()
  except concurrent.futures.process.BrokenProcessPool:
    raise UserError('processes', processes, 'fewer processes, or more memory: the system ended one of them') from None
  finally:
    pool.shutdown(cancel_futures=True)


def _start_worker(source: Source, tokenizer: Path, *rest: Any) -> None:
  threading.Thread(target=_end_with_parent, daemon=True).start()
  recipe = Recipe(source, load_tokenizer(tokenizer), *rest)
  _worker['encode'] = _encoder(recipe, recipe.tokenizer)


def _end_with_parent() -> None:
  """A pool's processes would wait for ever for a parent that was killed."""
  parent = multiprocessing.parent_process()
  if parent:
    parent.join()
    os._exit(1)


def _encode_in_worker(parts: list[Part]) -> Encoded:
  return _worker['encode'](parts)


def _encoder(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[list[Part]], Encoded]:
  dtype = id_dtype(tokenizer.vocab_size)
  separator = np.array([tokenizer.bos_id], dtype)

  def encode(parts: list[Part]) -> Encoded:
    pieces: list[np.ndarray] = []
    found = Encoded(np.empty(0, dtype), np.empty(0, np.int64), np.empty(0, np.int64), [], collections.Counter(), [], [], 0)
    lengths, sizes = [], []
    for index, part in enumerate(parts):
      records = 0
      for one in recipe.source.read(part):
        records += 1
        if one is None:
          continue
        if isinstance(one, Malformed):
          found.malformed_count += 1
          if len(found.malformed) < _TOLD:
            found.malformed.append((index, one))
          continue
        reason = recipe.filters.reason(one.text)
        if not reason and recipe.contamination and (name := recipe.contamination.hit(one.text)):
          reason = f'decontamination, {name}'
        if reason:
          found.dropped[reason] += 1
          continue
        data = one.text.encode()
        ids = tokenizer.encode(one.text, one.name)
        pieces += [separator, ids]
        lengths.append(len(ids) + 1)
        sizes.append(len(data))
        if recipe.deduplicate:
          found.digests.append(hashlib.blake2b(data, digest_size=16).digest())
      found.records.append(records)
    if pieces:
      found.ids = np.concatenate(pieces, dtype=dtype, casting='unsafe')
    found.lengths, found.sizes = np.array(lengths, np.int64), np.array(sizes, np.int64)
    return found

  return encode


class _Journal:
  """What is done, in a database beside the shards: progress and, for deduplication, a digest of every document.

  A transaction lasts a shard: a killed process leaves the state of the last finished one.

  Args:
    path: of the database.
    fingerprint: of the recipe; what was begun with another is forgotten.
  """

  def __init__(self, path: Path, fingerprint: str):
    self._path, self._fingerprint = path, fingerprint

  def __enter__(self) -> '_Journal':
    try:
      self._open()
    except sqlite3.DatabaseError:
      announce(f'{self._path}: damaged; started anew')
      self._base.close()
      self._path.unlink()
      self._open()
    row = self._execute('select fingerprint, state from progress').fetchone()
    if row and row[0] == self._fingerprint:
      self.progress = _Progress(**json.loads(row[1]))
      return self
    if row:
      announce(f'{self._path.parent}: begun with another source, tokenizer or filter; started anew')
    self.reset()
    return self

  def __exit__(self, *error: object) -> None:
    self._base.close()

  def _open(self) -> None:
    self._base = sqlite3.connect(self._path, isolation_level=None)
    self._base.execute('pragma cache_size = -100000')  # kB; the rest stays on disk
    self._base.execute('create table if not exists progress (fingerprint text, state text)')
    self._base.execute('create table if not exists digests (digest blob primary key) without rowid')
    self._base.execute('begin')

  def _execute(self, *statement: Any) -> sqlite3.Cursor:
    try:
      return self._base.execute(*statement)
    except sqlite3.Error as error:  # a full disk, for one
      raise OSError(0, str(error), str(self._path)) from None

  def reset(self) -> None:
    """Forgets what was done, for good: before the files of it go."""
    self.progress = _Progress()
    self._execute('delete from digests')
    self._execute('delete from progress')
    self._execute('insert into progress values (?, ?)', (self._fingerprint, ''))
    self.commit()

  def new(self, digests: Iterable[bytes]) -> np.ndarray:
    """Which of these documents were not seen before, and remembers them."""
    insert = 'insert or ignore into digests values (?)'
    return np.array([self._execute(insert, (digest,)).rowcount == 1 for digest in digests], bool)

  def commit(self) -> None:
    """Makes what was done up to now last."""
    self._execute('update progress set state = ?', (json.dumps(dataclasses.asdict(self.progress)),))
    self._execute('commit')
    self._execute('begin')
