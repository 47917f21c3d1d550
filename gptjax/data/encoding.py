"""Encoding: parts of a source become ids, in this process or in several, in the order of the source."""

import collections
import concurrent.futures.process
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator

import numpy as np

from gptjax.config import UserError
from gptjax.data.filters import Contamination, Filters
from gptjax.data.sources import Malformed, Part, Source
from gptjax.data.store import VERSION
from gptjax.data.store_writer import id_dtype
from gptjax.data.tokenizers import Tokenizer

TASK = 2**22
"""Bytes of a source that a process is given at once; small parts go together."""

TOLD = 20
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
    parts = [VERSION, TASK, self.source.part_bytes, self.source.fingerprint(), self.tokenizer.sha256, dataclasses.asdict(self.filters),
             self.contamination.sha256 if self.contamination else '', self.deduplicate, self.shard_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclasses.dataclass
class Encoded:
  """Some parts of a source, tokenized."""

  ids: np.ndarray
  """of all documents, each after a separator and, if it is another id, before what ends it"""
  lengths: np.ndarray
  """[documents] ids of each, separator and end included"""
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


def cores() -> int:
  """Cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def tasks_of(parts: Iterable[Part]) -> Iterator[list[Part]]:
  """Parts in groups of some megabytes."""
  task: list[Part] = []
  size = 0
  for part in parts:
    task.append(part)
    size += max(part.size, len(part.payload))  # a part of a compressed file takes up less there than here
    if size >= TASK:
      yield task
      task, size = [], 0
  if task:
    yield task


# What a worker process keeps from task to task.
_worker: dict[str, Callable[[list[Part]], Encoded]] = {}


def encoded(tasks: Iterator[list[Part]], recipe: Recipe, processes: int) -> Generator[tuple[list[Part], Encoded], None, None]:
  """Encodes tasks over processes; results come in the order of the tasks, and only some tasks are under way at a time.

  To be closed, so that the processes end.
  """
  ahead = [task for _, task in zip(range(2), tasks)]
  if processes == 1 or len(ahead) < 2:  # starting a process takes longer than a task
    encode = _encoder(recipe)
    yield from ((task, encode(task)) for task in itertools.chain(ahead, tasks))
    return
  context = multiprocessing.get_context('spawn')  # a fork of a process with threads may hang
  pool = concurrent.futures.ProcessPoolExecutor(processes, context, _start_worker, (recipe,))
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


def _start_worker(recipe: Recipe) -> None:
  threading.Thread(target=end_with_parent, daemon=True).start()
  _worker['encode'] = _encoder(recipe)


def end_with_parent() -> None:
  """Ends a worker when its parent was killed, for which it would wait for ever; to be run by a thread of it."""
  parent = multiprocessing.parent_process()
  if parent:
    parent.join()
    os._exit(1)


def _encode_in_worker(parts: list[Part]) -> Encoded:
  return _worker['encode'](parts)


def _encoder(recipe: Recipe) -> Callable[[list[Part]], Encoded]:
  tokenizer = recipe.tokenizer
  dtype = id_dtype(tokenizer.vocab_size)
  separator = np.array([tokenizer.bos_id], dtype)
  end = np.array([tokenizer.eos_id] if tokenizer.eos_id != tokenizer.bos_id else [], dtype)

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
          if len(found.malformed) < TOLD:
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
        pieces += [separator, ids, end]
        lengths.append(1 + len(ids) + len(end))
        sizes.append(len(data))
        if recipe.deduplicate:
          found.digests.append(hashlib.blake2b(data, digest_size=16).digest())
      found.records.append(records)
    if pieces:
      found.ids = np.concatenate(pieces, dtype=dtype, casting='unsafe')
    found.lengths, found.sizes = np.array(lengths, np.int64), np.array(sizes, np.int64)
    return found

  return encode
