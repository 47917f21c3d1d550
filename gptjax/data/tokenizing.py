"""Tokenizing: a source becomes a token store, in one process or several; an interrupted build resumes after its last finished shard."""

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import sqlite3
import threading
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptjax.config import UserError
from gptjax.data.examples import encode_example
from gptjax.data.filters import Contamination, Filters
from gptjax.data.progress import ProgressBar, announce
from gptjax.data.sources import Malformed, Part, Source, malformed_error, with_mismatched
from gptjax.data.store import MANIFEST, VERSION, Shard, ShardRecord, ShardWriter, TokenStore, finish_store, token_dtype, shard_name
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import atomic_directory

TASK = 2**22  # bytes of source per task of a process; small parts are combined
_MAX_REPORTED = 20  # malformed records that are reported individually
_JOURNAL = 'journal.db'


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Everything that determines a store; equal recipes give byte-identical stores, with any number of processes."""

  source: Source
  tokenizer: Tokenizer
  filters: Filters = Filters()
  contamination: Contamination | None = None
  deduplicate: bool = False
  """drop documents whose text occurred before"""
  shard_tokens: int = 2**28
  """a shard ends with the first task that brings it to this many ids"""

  @property
  def token_dtype(self) -> np.dtype:
    """Of the store."""
    return token_dtype(self.tokenizer.vocab_size, self.source.has_examples)

  def fingerprint(self) -> str:
    """Hex digest; the source enters with names, sizes and modification times."""
    # Without source.skip, because a resumed build may have a higher limit.
    parts = [VERSION, TASK, self.source.part_bytes, self.source.fingerprint(), self.tokenizer.sha256, dataclasses.asdict(self.filters),
             self.contamination.sha256 if self.contamination else '', self.deduplicate, self.shard_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class EncodedDocument(NamedTuple):
  """A document as it is stored, or an example."""

  tokens: bytes
  """of a document, a separator, its ids and, if it is another id, the end id"""
  bytes: int
  """of its text in UTF-8"""
  digest: bytes
  """if duplicates are dropped"""
  targets: float = 0.0
  """sum of an example's weights"""
  target_bytes: float = 0.0
  """UTF-8 bytes of an example's turns, times their weights, or of a text to classify"""
  label: int | None = None
  """number of its class"""
  parts: int = 1


@dataclasses.dataclass
class Encoded:
  """The documents of a task."""

  documents: list[EncodedDocument] = dataclasses.field(default_factory=list)
  dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  """documents by reason"""
  records: list[tuple[int, list[Malformed]]] = dataclasses.field(default_factory=list)
  """number of records of each part, and those that are malformed"""


def encode(recipe: Recipe, parts: list[Part]) -> Encoded:
  """Reads, filters and encodes the documents of a task."""
  tokenizer, dtype = recipe.tokenizer, recipe.token_dtype
  separator, end = [tokenizer.bos_id], [tokenizer.eos_id] if tokenizer.eos_id != tokenizer.bos_id else []
  result = Encoded()
  for part in parts:
    count, malformed = 0, []
    records = recipe.source.read(part)
    for record in with_mismatched(records) if recipe.source.has_examples else records:
      count += 1
      if isinstance(record, Malformed):
        malformed.append(record)
      elif record is None:
        continue
      elif reason := recipe.filters.reason(record.text):
        result.dropped[reason] += 1
      elif recipe.contamination and (name := recipe.contamination.find(record.text)):
        result.dropped[f'decontamination, {name}'] += 1
      else:
        data = record.text.encode()
        digest = hashlib.blake2b(data, digest_size=16).digest() if recipe.deduplicate else b''
        if recipe.source.has_examples:
          try:
            ids, weights, target_bytes = encode_example(tokenizer, record)
          except UserError as error:
            value, _, expected = str(error).partition(', expected: ')
            malformed.append(Malformed(value, expected, count - 1))
            continue
          tokens = np.empty(len(ids), dtype)
          tokens['id'], tokens['weight'] = ids, weights
          result.documents.append(EncodedDocument(tokens.tobytes(), len(data), digest, float(weights[weights > 0].sum()), target_bytes,
                                                  record.label, 1 + len(record.others)))
        else:
          ids = np.concatenate([separator, tokenizer.encode(record.text, record.name), end], dtype=dtype, casting='unsafe')
          result.documents.append(EncodedDocument(ids.tobytes(), len(data), digest))
    result.records.append((count, malformed))
  return result


def cores() -> int:
  """CPU cores available to this process."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def tasks_of(parts: Iterable[Part]) -> Iterator[list[Part]]:
  """Groups parts into tasks of some megabytes."""
  task: list[Part] = []
  size = 0
  for part in parts:
    task.append(part)
    size += max(part.size, len(part.payload))  # the size of a compressed part is smaller than its payload
    if size >= TASK:
      yield task
      task, size = [], 0
  if task:
    yield task


def encode_tasks(tasks: Iterator[list[Part]], recipe: Recipe, processes: int) -> Generator[tuple[list[Part], Encoded], None, None]:
  """Encodes tasks in processes that end when the generator is closed; yields results in order, few tasks ahead."""
  first = list(itertools.islice(tasks, 2))
  tasks = itertools.chain(first, tasks)
  if processes == 1 or len(first) < 2:  # starting a process takes longer than a task
    yield from ((task, encode(recipe, task)) for task in tasks)
    return
  context = multiprocessing.get_context('spawn')  # forking a process with threads may hang
  pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, (recipe,))
  pending: collections.deque[tuple[list[Part], concurrent.futures.Future]] = collections.deque()
  try:
    for task in tasks:
      pending.append((task, pool.submit(_encode_in_worker, task)))
      if len(pending) > 2 * processes:
        done, future = pending.popleft()
        yield done, future.result()
    for done, future in pending:
      yield done, future.result()
  except concurrent.futures.process.BrokenProcessPool:
    raise UserError('processes', processes, 'fewer processes, or more memory: the system killed one of them') from None
  finally:
    pool.shutdown(cancel_futures=True)


_worker_recipe: list[Recipe] = []  # of this process, if it is a worker


def _start_worker(recipe: Recipe) -> None:
  threading.Thread(target=end_with_parent, daemon=True).start()
  _worker_recipe[:] = [recipe]


def _encode_in_worker(parts: list[Part]) -> Encoded:
  return encode(_worker_recipe[0], parts)


def end_with_parent() -> None:
  """Ends a worker process whose parent is killed, for which it would otherwise wait forever; runs in a thread."""
  parent = multiprocessing.parent_process()
  if parent:
    parent.join()
    os._exit(1)


def write_store(directory: Path, recipe: Recipe, *, processes: int = 1, title: str = 'tokenizing') -> TokenStore:
  """Makes a store, or resumes an interrupted build; a store of the same recipe is left unchanged.

  Memory does not depend on the size of the source. Raises a UserError if too many records are malformed, a text cannot be encoded, no
  documents remain, or the folder has a store of another recipe, even an unfinished one. Finished shards are kept for a later call.
  """
  try:
    with atomic_directory(directory, lambda folder: any(folder.glob('*.shard'))) as folder:
      if folder:
        _build(folder, recipe, processes, title)
  except sqlite3.OperationalError as error:  # for example, a full disk
    raise UserError(f'write {directory}', str(error), f'a disk with space left, on which SQLite can write {_JOURNAL}') from None
  store = TokenStore.open(directory)
  if store.manifest.get('fingerprint') != recipe.fingerprint():
    raise UserError('--out', str(directory), 'another folder: this one has a store of another source, tokenizer or filter')
  return store


def _build(folder: Path, recipe: Recipe, processes: int, title: str) -> None:
  # The manifest is written last: if it is there, only renaming the folder was missing.
  if not (folder / MANIFEST).exists() or TokenStore.open(folder).manifest.get('fingerprint') != recipe.fingerprint():
    (folder / MANIFEST).unlink(missing_ok=True)
    with contextlib.closing(Journal(folder / _JOURNAL, recipe.fingerprint())) as journal:
      _remove_unfinished(folder, journal, recipe.token_dtype.itemsize)
      state = journal.state
      with ProgressBar(title, recipe.source.size, 'bytes', state.source_bytes) as progress:
        tasks = itertools.islice(tasks_of(recipe.source.parts()), state.tasks, None)
        with contextlib.closing(encode_tasks(tasks, recipe, processes)) as results:
          _write_shards(folder, recipe, journal, results, progress)
      if not state.shards:
        held_out = f'; data.valid_fraction holds out {recipe.source.held_out}' if recipe.source.held_out else ''
        raise UserError('source', recipe.source.description, f'documents; none of its {state.records:,} records is left, dropped were '
                        f'{state.dropped}{held_out}')
    finish_store(folder, recipe.tokenizer, state.shards, {
      'source': recipe.source.description, 'held_out': recipe.source.held_out, 'records': state.records, 'malformed': state.malformed,
      'malformed_first': state.malformed_first, 'dropped': state.dropped, 'filters': dataclasses.asdict(recipe.filters),
      'deduplicated': recipe.deduplicate, 'decontaminated': recipe.contamination.names if recipe.contamination else [],
      'fingerprint': recipe.fingerprint(),
      'examples': {'targets': state.targets, 'target_bytes': state.target_bytes, 'least_targets': state.least_targets,
                   'parts': state.parts, 'labels': dict(zip(recipe.source.labels, state.label_counts))}
                  if recipe.source.has_examples else None})
  for path in folder.glob(f'{_JOURNAL}*'):  # including files that SQLite leaves beside it in a killed process
    path.unlink()


def _remove_unfinished(folder: Path, journal: 'Journal', itemsize: int) -> None:
  """Removes shards that the journal does not list, or all if one that it lists is missing."""
  shards = [Shard(shard_name(number), 0, 0, record.tokens, record.documents, itemsize)
            for number, record in enumerate(journal.state.shards)]
  paths = [folder / shard.name for shard in shards]
  if not all(path.exists() and path.stat().st_size == shard.size for path, shard in zip(paths, shards)):
    announce(f'{folder}: finished shards are missing; starting over')
    journal.reset()
    paths = []
  if paths:
    announce(f'{folder}: resuming after {len(paths)} finished shards')
  for path in {*folder.glob('*.shard'), *folder.glob('*.partial')} - {*paths}:
    path.unlink()


@dataclasses.dataclass
class BuildState:
  """State needed to resume after a finished shard."""

  tasks: int = 0
  source_bytes: int = 0
  records: int = 0
  malformed: int = 0
  malformed_first: list[str] = dataclasses.field(default_factory=list)
  file: str = ''
  file_records: int = 0
  """records of `file` so far"""
  dropped: dict[str, int] = dataclasses.field(default_factory=dict)
  targets: float = 0.0
  target_bytes: float = 0.0
  least_targets: float = math.inf
  """of an example"""
  label_counts: list[int] = dataclasses.field(default_factory=list)
  """of texts, by the number of their class"""
  parts: int = 1
  """of examples"""
  shards: list[ShardRecord] = dataclasses.field(default_factory=list)


class Journal:
  """A database with the state and the digests of documents. Raises a UserError if there are finished shards of another recipe."""

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
    """Discards what is not committed."""
    self._database.close()

  def reset(self) -> None:
    """Discards the state permanently; to be called before its files are removed."""
    self.state = BuildState()
    self._database.executescript('delete from digests; delete from progress')
    self._database.execute('insert into progress values (?, ?)', (self._fingerprint, '{}'))
    self.commit()

  def is_new(self, digest: bytes) -> bool:
    """Adds a digest; whether no document had it before."""
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
  for parts, encoded in tasks:
    _count(state, recipe.source, parts, encoded)
    documents = encoded.documents
    if recipe.deduplicate:
      documents = [document for document in documents if journal.is_new(document.digest)]
      encoded.dropped['duplicate'] += len(encoded.documents) - len(documents)
    if documents:
      shard = shard or ShardWriter(folder, len(state.shards), recipe.token_dtype)
      shard.append([document.tokens for document in documents], sum(document.bytes for document in documents))
      if recipe.source.has_examples:
        state.targets += sum(document.targets for document in documents)
        state.target_bytes += sum(document.target_bytes for document in documents)
        state.parts = documents[0].parts
        state.least_targets = min(state.least_targets, *(document.targets for document in documents))
        counts = collections.Counter(document.label for document in documents)
        state.label_counts = [before + counts[label] for label, before in enumerate(state.label_counts or [0] * len(recipe.source.labels))]
    state.dropped = dict(sorted((collections.Counter(state.dropped) + encoded.dropped).items()))
    if shard and shard.tokens >= recipe.shard_tokens:
      state.shards.append(shard.close())
      journal.commit()
      shard = None
    progress.advance(sum(part.size for part in parts))
  _check_malformed(state, recipe.source.skip)
  if shard:
    state.shards.append(shard.close())
    journal.commit()


def _count(state: BuildState, source: Source, parts: list[Part], encoded: Encoded) -> None:
  """Updates the state, and reports the first malformed records with their position in the file."""
  for part, (records, malformed) in zip(parts, encoded.records):
    if part.file != state.file:
      state.file, state.file_records = part.file, 0
    for record in malformed[:_MAX_REPORTED - len(state.malformed_first)]:
      error = malformed_error(source, part, record, state.file_records)
      if not source.skip:
        raise error
      state.malformed_first.append(str(error))
      announce(f'skipped: {error}')
    state.file_records += records
    state.records += records
    state.malformed += len(malformed)
  state.tasks += 1
  state.source_bytes += sum(part.size for part in parts)
  if state.records >= 10_000:  # fewer do not give a meaningful fraction
    _check_malformed(state, source.skip)


def _check_malformed(state: BuildState, skip: float) -> None:
  if state.malformed > skip * state.records:
    raise UserError('data.source.skip', skip, f'a fraction above the {state.malformed:,} malformed of {state.records:,} records, '
                    'or a source without them')
