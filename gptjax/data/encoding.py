"""Encoding: parts of a source become ids, in one process or several, in the order of the source."""

import collections
import concurrent.futures.process
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Generator, Iterable, Iterator

import numpy as np

from gptjax.config import UserError
from gptjax.data.filters import Contamination, Filters
from gptjax.data.sources import Malformed, Part, Source
from gptjax.data.store import VERSION, id_dtype
from gptjax.data.tokenizers import Tokenizer

TASK = 2**22
"""Bytes of source per task of a process; small parts are combined."""

MAX_REPORTED = 20
"""Malformed records that are reported individually."""


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

  def fingerprint(self) -> str:
    """Hex digest of the recipe, with the source by names, sizes and modification times."""
    # Without source.skip: malformed records are counted over the entire source, and a resumed build may have a higher limit.
    parts = [VERSION, TASK, self.source.part_bytes, self.source.fingerprint(), self.tokenizer.sha256, dataclasses.asdict(self.filters),
             self.contamination.sha256 if self.contamination else '', self.deduplicate, self.shard_tokens]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclasses.dataclass
class Encoded:
  """The encoded documents of a task."""

  documents: list[tuple[bytes, int, bytes]] = dataclasses.field(default_factory=list)
  """of each: its ids, between a separator and, if it is another id, the end id; its UTF-8 bytes; a digest if duplicates are dropped"""
  dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  """documents by reason"""
  records: list[int] = dataclasses.field(default_factory=list)
  """records of each part"""
  malformed: list[tuple[int, Malformed]] = dataclasses.field(default_factory=list)
  """the first few, with the index of their part"""
  malformed_count: int = 0


def encode(recipe: Recipe, parts: list[Part]) -> Encoded:
  """Reads, filters and encodes the documents of a task."""
  tokenizer = recipe.tokenizer
  dtype = id_dtype(tokenizer.vocab_size)
  separator = np.array([tokenizer.bos_id], dtype)
  end = np.array([tokenizer.eos_id] if tokenizer.eos_id != tokenizer.bos_id else [], dtype)
  result = Encoded()
  for index, part in enumerate(parts):
    result.records.append(0)
    for record in recipe.source.read(part):
      result.records[-1] += 1
      if isinstance(record, Malformed):
        result.malformed_count += 1
        if len(result.malformed) < MAX_REPORTED:
          result.malformed.append((index, record))
      elif record is None:
        continue
      elif reason := recipe.filters.reason(record.text):
        result.dropped[reason] += 1
      elif recipe.contamination and (name := recipe.contamination.find(record.text)):
        result.dropped[f'decontamination, {name}'] += 1
      else:
        data = record.text.encode()
        ids = np.concatenate([separator, tokenizer.encode(record.text, record.name), end], dtype=dtype, casting='unsafe')
        digest = hashlib.blake2b(data, digest_size=16).digest() if recipe.deduplicate else b''
        result.documents.append((ids.tobytes(), len(data), digest))
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


_worker_recipe: list[Recipe] = []
"""In a worker process, its recipe."""


def _start_worker(recipe: Recipe) -> None:
  threading.Thread(target=end_with_parent, daemon=True).start()
  _worker_recipe[:] = [recipe]


def _encode_in_worker(parts: list[Part]) -> Encoded:
  return encode(_worker_recipe[0], parts)


def end_with_parent() -> None:
  """Ends a worker when its parent is killed, for which it would otherwise wait forever; to be run in a thread of the worker."""
  parent = multiprocessing.parent_process()
  if parent:
    parent.join()
    os._exit(1)
