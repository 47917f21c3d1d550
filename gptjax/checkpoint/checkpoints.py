"""Checkpoints of a run: this module commits, verifies, selects and removes them.

A checkpoint is a folder named after its step. It is written to a temporary folder that is renamed atomically once all files and a
manifest of their checksums are on the disk. What is loaded is verified first, since Orbax does not notice a flipped bit. Orbax's own
Checkpointer is not used: it commits before a manifest could be written, and its retention policies count damaged checkpoints.
"""

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoint.arrays import FOLDERS, array_folder, array_metadata, by_name, load, save
from gptjax.checkpoint.manifest import Damaged, read_manifest, streaming_checksums, verify, write_manifest, write_part
from gptjax.checkpoint.staging import HostStaging
from gptjax.config import Fault, UserError
from gptjax.data.progress import announce
from gptjax.distributed import all_gather, broadcast, is_primary, process_group
from gptjax.files import sync
from gptjax.model import Parameters

VERSION = 2
"""Version of the names of arrays and of the facts in the manifest; a checkpoint of another version is refused."""
DAMAGED = 'damaged'
"""Folder next to `checkpoints` to which damaged ones are moved."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a run is; stored in a checkpoint with the arrays."""

  step: int = 0
  """steps taken, skipped ones included"""
  rows: int = 0
  """number of rows read; this is the complete state of the data"""
  tokens: float = 0
  """number of targets seen, times their weights; counted on the host, since it may exceed an int32"""


@dataclasses.dataclass(frozen=True)
class Retention:
  """Which checkpoints to keep: CheckpointConfig with steps for durations; `latest` 0: all."""

  latest: int = 2
  every: int = 0
  best: bool = False

  def kept(self, losses: Mapping[int, float | None]) -> set[int]:
    """The steps to keep, given all steps with their validation losses."""
    steps = sorted(losses)
    kept = set(steps[-self.latest:]) | {step for step in steps if self.every and step % self.every == 0}
    scored = {step: loss for step, loss in losses.items() if loss is not None}
    return kept | ({_best(scored)} if self.best and scored else set())


class Checkpoints:
  """The checkpoints in one folder. Saves run in the background. A context manager that waits for them.

  Without `retention` it only reads; otherwise the caller is the only run that writes here, and leftovers of killed runs are removed.
  `extra_files` are files and folders to copy into each checkpoint. `folders` are those of the arrays that are loaded, and so verified.
  """

  def __init__(self, directory: Path, retention: Retention | None = None, extra_files: tuple[Path, ...] = (),
               folders: tuple[str, ...] = FOLDERS):
    self._directory, self._retention, self._extra_files, self._folders = array_folder(directory), retention, extra_files, folders
    self._pending: Future | None = None
    self._verified: set[int] = set()
    self._staging = HostStaging()
    self._background = ThreadPoolExecutor(1, 'checkpoints')  # of normal priority: the next save and the end of the run wait for it
    if retention and is_primary() and directory.exists():
      for path in directory.iterdir():
        if '.saving' in path.name or '.dropped' in path.name:
          shutil.rmtree(path)

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, damaged or not, in ascending order."""
    names = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

  def newest(self, below: int | None = None) -> int | None:
    """The newest step (below a given one) whose checkpoint is intact, None if there is no checkpoint. All processes must call this.

    Newer damaged checkpoints are reported and, by a run that writes here, moved to the folder `damaged`. Raises a UserError if all are
    damaged, and an OSError if a checkpoint cannot be read now.
    """
    damaged: dict[int, str] = {}
    for step in reversed([step for step in broadcast('steps', self.steps()) if below is None or step < below]):
      if not (wrong := self._wrong(step)):
        if is_primary():
          self._report(damaged)
        return step
      if step not in broadcast('steps', self.steps()):  # the run that writes here has removed it meanwhile, and has newer ones
        return self.newest(below)
      damaged[step] = wrong
    if damaged:
      reasons = '; '.join(f'{step}: {words}' for step, words in damaged.items())
      raise UserError('checkpoint', str(self._directory), f'an intact checkpoint, but all are damaged ({reasons})')
    return None

  def _report(self, damaged: Mapping[int, str]) -> None:
    for step, words in damaged.items():
      action = 'skipped'
      if self._retention:
        target = self._directory.with_name(DAMAGED) / f'{step}-{time.strftime("%Y%m%d-%H%M%S")}'
        target.parent.mkdir(exist_ok=True)
        action = f'moved to {self.folder(step).rename(target)}'
      announce(f'checkpoint {step} is damaged: {words}; {action}')

  def resolve(self, wanted: str) -> int:
    """Returns the step for 'latest', 'best' (lowest validation loss) or a number, or raises a UserError. All processes must call this."""
    steps = broadcast('steps', self.steps())
    if not steps:
      raise UserError('--workdir', str(self._directory.parent), 'a folder with checkpoints, written by gptjax.train')
    if wanted == 'latest':
      newest = self.newest()
      assert newest is not None
      return newest
    scored = {step: loss for step, loss in broadcast('losses', list(self._losses().items())) if loss is not None}
    if wanted == 'best' and scored:
      return _best(scored)
    if wanted.isdecimal() and int(wanted) in steps:
      return int(wanted)
    best = ', best' if scored else ''
    raise UserError('--step', wanted, f'latest{best}, {", ".join(map(str, steps))}')

  def resolve_all(self, wanted: str) -> list[int]:
    """As `resolve`, but returns the steps, in ascending order, for 'all' or a list such as '100,200,best'."""
    if wanted == 'all' and (steps := broadcast('steps', self.steps())):
      return steps
    return sorted({self.resolve(one.strip()) for one in wanted.split(',')})

  def prepare(self, state: Any) -> None:
    """Allocates the memory that saves of such a state need, in the background, so that the first save need not wait for it."""
    self._pending = self._background.submit(self._staging.reserve(state))

  def save(self, progress: Progress, state: Any, loss: float | None, waits: bool = False) -> None:
    """Starts a save, after waiting for the previous one, whose error is raised here.

    Raises a UserError if the disk is full, or the folder is not writable or missing; earlier checkpoints are not affected. `loss` is the
    validation loss at this step, if known. With `waits` this returns when the checkpoint is committed, and does not copy the state.
    """
    assert self._retention, 'these checkpoints are read only'
    self.wait()
    saving = self._directory / f'{progress.step}.saving'
    # NaN would compare as the best loss.
    facts = {'version': VERSION, 'progress': dataclasses.asdict(progress),
             'loss': loss if loss is not None and math.isfinite(loss) else None,
             'saved': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}
    with self._user_errors():
      written = save(saving, state if waits else self._staging.copy(state))
    self._pending = self._background.submit(self._finish, written, saving, progress.step, facts, by_name(state, np.shape))
    if waits:
      self.wait()

  def _finish(self, written: Callable[[], None], saving: Path, step: int, facts: dict[str, Any],
              shapes: dict[str, tuple[int, ...]]) -> None:
    try:
      with streaming_checksums(saving, process_group().index) as checksums:
        written()
      write_part(saving, process_group().index, checksums)
      if is_primary():
        self._commit(saving, step, facts, shapes)
    except BaseException:
      if is_primary():  # frees the space; Orbax's threads may still write, and the next start removes their files
        for path in saving.parent.glob(f'{saving.name}*'):
          shutil.rmtree(path, ignore_errors=True)
      raise

  def _commit(self, saving: Path, step: int, facts: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    if _shapes(saving) != shapes:
      raise Fault(f'{saving}: Orbax cannot read back what it has written, expected: a checkpoint with all arrays of the state')
    if step in self.steps():  # committed already by a save that failed in another process, and that all have repeated
      shutil.rmtree(saving)
    else:
      for path in self._extra_files:
        shutil.copytree(path, saving / path.name) if path.is_dir() else shutil.copyfile(path, saving / path.name)
      write_manifest(saving, facts, process_group().count)
      saving.rename(self.folder(step))
      sync(self._directory)
    assert self._retention
    for old in {*self.steps()} - self._retention.kept(self._losses()):
      self._verified.discard(old)
      dropped = self._directory / f'{old}.dropped'  # a kill while it is removed leaves nothing that looks like a checkpoint
      shutil.rmtree(dropped, ignore_errors=True)  # best effort: the next start removes the rest
      self.folder(old).rename(dropped)
      shutil.rmtree(dropped, ignore_errors=True)

  def wait(self) -> bool:
    """Returns when the pending save is committed, and whether there was one, or raises a UserError as `save` does."""
    pending, self._pending = self._pending, None
    if pending is not None:
      with self._user_errors():
        pending.result()
    return pending is not None

  @property
  def saving(self) -> bool:
    """Whether a save is running; the error of one that has ended is raised by `wait`."""
    return self._pending is not None and not self._pending.done()

  def restore(self, step: int, state: Any) -> tuple[Any, Progress]:
    """Loads a checkpoint with the dtypes and shardings of an abstract tree; raises a UserError if it is damaged, or has other shapes."""
    wanted, found = by_name(state), self._stored(step)
    self._check(step, wanted, found)
    if more := sorted(found.keys() - wanted.keys()):
      raise self._unfit(step, f'it also has {", ".join(more[:3])}')
    arrays = self._load(step, wanted)
    return jax.tree.unflatten(jax.tree.structure(state), [arrays[name] for name in wanted]), self.progress(step)

  def progress(self, step: int) -> Progress:
    """Returns the progress stored in a checkpoint."""
    try:
      return Progress(**read_manifest(self.folder(step))['facts']['progress'])
    except Damaged as damaged:
      raise self._unfit(step, str(damaged)) from None

  @property
  def directory(self) -> Path:
    """The folder of all of them."""
    return self._directory

  def folder(self, step: int) -> Path:
    """The folder of a checkpoint."""
    return self._directory / str(step)

  def restore_parameters(self, step: int, parameters: dict[str, jax.ShapeDtypeStruct]) -> Parameters:
    """As `restore`, but loads only the parameters of a TrainState, without allocating its optimizer state."""
    found = self._stored(step)
    full = {name: f'frozen/{name}' if f'frozen/{name}' in found else f'trained/{name}' for name in parameters}
    wanted = {full[name]: leaf for name, leaf in parameters.items()}
    self._check(step, wanted, found)
    arrays = self._load(step, wanted)
    return {name: arrays[full[name]] for name in parameters}

  def close(self) -> None:
    """Waits for the pending save."""
    try:
      self.wait()
    finally:
      self._background.shutdown()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
    with contextlib.suppress(*[UserError] if error else []):  # report only the error that ends the run
      self.close()

  def _check(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct], found: dict[str, tuple[int, ...]]) -> None:
    for name, leaf in wanted.items():
      if found.get(name) != leaf.shape:
        raise self._unfit(
          step, f'it has {f"{list(found[name])} instead of {list(leaf.shape)} for " if name in found else "no "}{name}')

  def _load(self, step: int, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    folder = self.folder(step)
    try:
      return load(folder, wanted)
    except Exception as error:
      # Orbax wraps every failure in one about its handlers.
      words = ' '.join(str(error.__cause__ or error).split())[:300]
      raise Fault(f'{folder}: {words}, expected: a checkpoint that can be loaded') from error

  def _stored(self, step: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays of an intact checkpoint by name."""
    if wrong := self._wrong(step):
      raise self._unfit(step, f'it is damaged: {wrong}')
    folder = self.folder(step)
    if (version := read_manifest(folder)['facts'].get('version')) != VERSION:
      raise self._unfit(step, f'it has version {version}, and this code reads version {VERSION}')
    return _shapes(folder, self._folders)

  def _wrong(self, step: int) -> str:
    """Returns in which way a checkpoint is damaged, '' if it is intact; every process reads a part of its files."""
    group = process_group()
    mine = '' if step in self._verified else verify(self.folder(step), {*FOLDERS}.difference(self._folders), group.index, group.count)
    wrong = next(filter(None, all_gather('verify', mine)), '')
    if not wrong:
      self._verified.add(step)
    return wrong

  def _losses(self) -> dict[int, float | None]:
    losses: dict[int, float | None] = dict.fromkeys(self.steps())
    for step in losses:
      with contextlib.suppress(Damaged, OSError):  # reported when it is loaded
        losses[step] = read_manifest(self.folder(step))['facts']['loss']
    return losses

  def _unfit(self, step: int, reason: str) -> UserError:
    return UserError('checkpoint', str(self.folder(step)), f'an intact checkpoint of this config; {reason}')

  @contextlib.contextmanager
  def _user_errors(self) -> Iterator[None]:
    """Raises a UserError for a failure of the disk or of another process, and any other error as it is."""
    try:
      yield
    except Exception as error:
      full, text = (errno.ENOSPC, errno.EDQUOT), ' '.join(str(error).split())
      if getattr(error, 'errno', None) in full or any(os.strerror(code) in text for code in full):  # TensorStore has only texts
        expected = 'a disk with space left'
      elif isinstance(error, TimeoutError) or 'DEADLINE_EXCEEDED' in text:
        expected = 'a save that all processes complete; another process failed'
      elif isinstance(error, OSError) or 'PERMISSION_DENIED' in text or 'NOT_FOUND' in text:
        expected = f'a writable folder; {text[:200]}'
      else:
        raise
      raise UserError('checkpoint', str(self._directory), expected) from error


def _shapes(folder: Path, folders: tuple[str, ...] = FOLDERS) -> dict[str, tuple[int, ...]]:
  return {name: tuple(found.shape) for name, found in array_metadata(folder, folders).items()}


def _best(losses: Mapping[int, float]) -> int:
  """Returns the step with the lowest loss; of equal ones the newest."""
  return min(losses, key=lambda step: (losses[step], -step))
