"""The journal of a store that is being made: what is done, so that another process can go on."""

import dataclasses
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.progress import announce


@dataclasses.dataclass
class Progress:
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


class Journal:
  """What is done, in a database beside the shards: progress and, for deduplication, a digest of every document.

  A transaction lasts a shard: a killed process leaves the state of the last finished one.

  Args:
    path: of the database.
    fingerprint: of the recipe; what was begun with another is an error where shards of it are finished.
  """

  progress: Progress

  def __init__(self, path: Path, fingerprint: str):
    self._path, self._fingerprint = path, fingerprint

  def __enter__(self) -> 'Journal':
    try:
      self._open()
    except sqlite3.OperationalError as error:
      raise OSError(0, str(error), str(self._path)) from None
    except sqlite3.DatabaseError:
      announce(f'{self._path}: damaged; started anew')
      self._base.close()
      self._path.unlink()
      self._open()
    row = self._execute('select fingerprint, state from progress').fetchone()
    if row and row[0] == self._fingerprint:
      self.progress = Progress(**json.loads(row[1]))
      return self
    if row and (shards := json.loads(row[1])['shards']):
      self._base.close()
      raise UserError('--out', str(self._path.parent), f'the command with which its {len(shards)} finished shards were made, another '
                      'folder, or none there: source, tokenizer, filters or shard size differ')
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
    self.progress = Progress()
    self._execute('delete from digests')
    self._execute('delete from progress')
    self._execute('insert into progress values (?, ?)', (self._fingerprint, '{}'))
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
