"""Checkpoints of a run: Orbax writes and reads the arrays; this module commits, verifies, selects and removes checkpoints.

A checkpoint is a folder named after its step. It is written to a temporary folder that is renamed atomically once all files and a
manifest of their checksums are on the disk, and verified before it is loaded, since Orbax does not notice a flipped bit. Orbax's own
Checkpointer is not used: it commits before a manifest could be written, and its retention policies count damaged checkpoints.
"""

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from gptjax.checkpoint.checksums import StreamingChecksums
from gptjax.checkpoint.contents import by_name
from gptjax.checkpoint.manifest import Damaged, read_manifest, verify, write_manifest
from gptjax.checkpoint.staging import HostStaging
from gptjax.config import Config, Fault, UserError, read_config
from gptjax.data.progress import announce
from gptjax.files import sync
from gptjax.model import Parameters
from gptjax.distributed import process_group, is_primary, all_gather, broadcast

VERSION = 1
"""Of the names of arrays and of the facts in the manifest; a checkpoint of another version is refused."""
DAMAGED = 'damaged'
"""Folder next to `checkpoints` to which damaged ones are moved."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a run is; stored in a checkpoint with the arrays."""

  step: int = 0
  """number of updates"""
  rows: int = 0
  """number of rows read; this is the complete state of the data"""
  tokens: int = 0
  """number of targets seen; counted on the host, since it may exceed an int32"""


@dataclasses.dataclass(frozen=True)
class Retention:
  """Which checkpoints to keep."""

  latest: int = 2
  """number of the newest to keep; 0: all"""
  every: int = 0
  """also keep those whose step is a multiple of this; 0: off"""
  best: bool = False
  """also keep the one with the lowest validation loss"""

  def kept(self, losses: Mapping[int, float | None]) -> set[int]:
    """Returns the steps to keep, given all steps with their validation losses."""
    steps = sorted(losses)
    kept = set(steps[-self.latest:]) | {step for step in steps if self.every and step % self.every == 0}
    scored = {step: loss for step, loss in losses.items() if loss is not None}
    return kept | ({_best(scored)} if self.best and scored else set())


class Checkpoints:
  """The checkpoints in one folder. Saves run in the background. A context manager that waits for them.

  Args:
    directory: created by the first save.
    retention: None: read only. Otherwise the caller is the only run that writes here, and leftovers of killed runs are removed.
    extra_files: files and folders to copy into each checkpoint.
  """

  def __init__(self, directory: Path, retention: Retention | None = None, extra_files: tuple[Path, ...] = ()):
    self._directory, self._retention, self._extra_files = directory.absolute(), retention, extra_files
    self._pending: Future | None = None
    self._verified: set[int] = set()
    self._staging = HostStaging()
    self._background = ThreadPoolExecutor(1, 'checkpoints', _lower_priority)
    if retention and is_primary() and directory.exists():
      for path in directory.iterdir():
        if '.saving' in path.name or '.dropped' in path.name:
          shutil.rmtree(path)

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, damaged or not, in ascending order."""
    names = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

  def newest(self, below: int | None = None) -> int | None:
    """Returns the newest step, optionally below a given one, whose checkpoint is intact. All processes must call this.

    Newer damaged checkpoints are reported and, by a run that writes here, moved to the folder `damaged`.

    Raises:
      UserError: there are checkpoints, but all are damaged; they are not moved.
      OSError: a checkpoint cannot be read now, which does not mean that it is damaged.
    """
    damaged: dict[int, str] = {}
    for step in reversed([step for step in self._shared_steps() if below is None or step < below]):
      wrong = self._wrong(step)
      if not wrong:
        for other, words in damaged.items() if is_primary() else ():
          action = f'moved to {self._quarantine(other)}' if self._retention else 'skipped'
          announce(f'checkpoint {other} is damaged: {words}; {action}')
        return step
      if step not in self._shared_steps():  # the run that writes here has removed it meanwhile, and has newer ones
        return self.newest(below)
      damaged[step] = wrong
    if damaged:
      reasons = '; '.join(f'{step}: {words}' for step, words in damaged.items())
      raise UserError('checkpoint', str(self._directory), f'an intact checkpoint, but all are damaged ({reasons})')
    return None

  def _shared_steps(self) -> list[int]:
    """Returns `steps` as process 0 sees them."""
    return broadcast('checkpoints', self.steps())

  def resolve(self, wanted: str) -> int:
    """Returns the step for 'latest', 'best' (lowest validation loss) or a number. All processes must call this.

    Raises:
      UserError: there is no such checkpoint.
    """
    steps = self._shared_steps()
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
    """Returns the steps, in ascending order, for 'all' or a list such as '100,200,best'. All processes must call this.

    Raises:
      UserError: one of the checkpoints does not exist.
    """
    if wanted == 'all' and (steps := self._shared_steps()):
      return steps
    return sorted({self.resolve(one.strip()) for one in wanted.split(',')})

  def prepare(self, state: Any) -> None:
    """Allocates in the background the memory that saves of such a state need, so that the first save need not wait for it."""
    self._pending = self._background.submit(self._staging.reserve(state))

  def save(self, progress: Progress, state: Any, loss: float | None, waits: bool = False) -> None:
    """Starts a save, after waiting for the previous one, whose error is raised here.

    Args:
      progress: stored with the state; its step names the checkpoint.
      state: a tree of arrays.
      loss: validation loss at this step, for `Retention.best`; None: not validated.
      waits: return only when the checkpoint is committed. The state is then not copied, since nothing can change it meanwhile.

    Raises:
      UserError: the disk is full, or the folder is not writable or missing; earlier checkpoints are not affected.
    """
    assert self._retention, 'these checkpoints are read only'
    self.wait()
    saving = self._directory / f'{progress.step}.saving'
    # NaN would compare as the best loss.
    facts = {'version': VERSION, 'progress': dataclasses.asdict(progress),
             'loss': loss if loss is not None and math.isfinite(loss) else None,
             'saved': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}
    try:
      written = self._background.submit(self._begin, saving, state if waits else self._staging.copy(state)).result()
    except Exception as error:
      raise self._as_user_error(error) from error
    self._pending = self._background.submit(self._finish, written, saving, progress.step, facts)
    if waits:
      self.wait()

  def _begin(self, saving: Path, state: Any) -> Callable[[], None]:
    with _context():
      return ocp.save_async(saving, state, overwrite=True).result

  def _finish(self, written: Callable[[], None], saving: Path, step: int, facts: dict[str, Any]) -> None:
    try:
      with StreamingChecksums(saving, process_group().index) as checksums:
        written()
      if is_primary():
        self._commit(saving, step, facts, checksums.by_inode)
    except BaseException:
      if is_primary():  # frees the space; Orbax's threads may still write, and the next start removes what they leave
        for path in saving.parent.glob(f'{saving.name}*'):
          shutil.rmtree(path, ignore_errors=True)
      raise

  def _commit(self, saving: Path, step: int, facts: dict[str, Any], known: Mapping[int, tuple[int, str]]) -> None:
    if step in self.steps():  # committed already by a save that failed in another process, and that all have repeated
      shutil.rmtree(saving)
    else:
      for path in self._extra_files:
        shutil.copytree(path, saving / path.name) if path.is_dir() else shutil.copyfile(path, saving / path.name)
      write_manifest(saving, facts, known)
      saving.rename(self._directory / str(step))
      sync(self._directory)
    assert self._retention
    for old in {*self.steps()} - self._retention.kept(self._losses()):
      self._drop(old)

  def wait(self) -> None:
    """Returns when the pending save is committed.

    Raises:
      UserError: as in `save`.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      try:
        pending.result()
      except Exception as error:
        raise self._as_user_error(error) from error

  @property
  def saving(self) -> bool:
    """Whether a save is running; the error of one that has ended is raised by `wait`."""
    return self._pending is not None and not self._pending.done()

  def restore(self, step: int, state: Any) -> tuple[Any, Progress]:
    """Loads a checkpoint with the shapes, dtypes and shardings of an abstract tree.

    Raises:
      UserError: the checkpoint is damaged, or has other shapes.
    """
    return self._load(step, state), self.progress(step)

  def progress(self, step: int) -> Progress:
    """Returns the progress stored in a checkpoint."""
    try:
      return Progress(**read_manifest(self._directory / str(step))['facts']['progress'])
    except Damaged as damaged:
      raise self._unfit(step, str(damaged)) from None

  def config(self, step: int) -> Config:
    """Returns the config of the run when it wrote a checkpoint."""
    return read_config(self._directory / str(step))

  def restore_parameters(self, step: int, parameters: dict[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Loads only the parameters of a TrainState, without allocating its optimizer state.

    Raises:
      UserError: the checkpoint is damaged, or has other shapes.
    """
    stored = self._shapes(step)
    parts: dict[str, dict[str, jax.ShapeDtypeStruct]] = {'trained': {}, 'frozen': {}}
    for name, shape in parameters.items():
      parts['frozen' if f'frozen/{name}' in stored else 'trained'][name] = shape
    loaded = self._load(step, {part: wanted for part, wanted in parts.items() if wanted}, partial=True)
    return {name: array for part in loaded.values() for name, array in part.items()}

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

  def _load(self, step: int, wanted: Any, partial: bool = False) -> Any:
    if wrong := self._wrong(step):
      raise self._unfit(step, f'it is damaged: {wrong}')
    if (version := read_manifest(self._directory / str(step))['facts'].get('version')) != VERSION:
      raise self._unfit(step, f'it has version {version}, and this code reads version {VERSION}')
    folder, found = self._directory / str(step), self._shapes(step)
    expected = by_name(wanted, lambda leaf: tuple(leaf.shape))
    for name, shape in expected.items():
      if found.get(name) != shape:
        raise self._unfit(step, f'it has {f"{list(found[name])} instead of {list(shape)} for " if name in found else "no "}{name}')
    if not partial and (more := sorted(found.keys() - expected.keys())):
      raise self._unfit(step, f'it also has {", ".join(more[:3])}')
    try:
      with _context(partial):
        return ocp.load(folder, wanted)
    except Exception as error:
      # Orbax wraps every failure in one about its handlers; only the cause is of use to a person.
      words = ' '.join(str(error.__cause__ or error).split())[:300]
      raise Fault(f'{folder}: {words}, expected: a checkpoint that can be loaded') from error

  def _shapes(self, step: int) -> dict[str, tuple[int, ...]]:
    return by_name(ocp.metadata(self._directory / str(step)).metadata, lambda leaf: tuple(leaf.shape))

  def _wrong(self, step: int) -> str:
    """Returns in which way a checkpoint is damaged, '' if it is intact; every process reads a part of its files."""
    group = process_group()
    mine = '' if step in self._verified else verify(self._directory / str(step), group.index, group.count)
    wrong = next(filter(None, all_gather('verify', mine)), '')
    if not wrong:
      self._verified.add(step)
    return wrong

  def _losses(self) -> dict[int, float | None]:
    losses: dict[int, float | None] = {}
    for step in self.steps():
      try:
        losses[step] = read_manifest(self._directory / str(step))['facts']['loss']
      except (Damaged, OSError):  # reported when it is loaded
        losses[step] = None
    return losses

  def _drop(self, step: int) -> None:
    """Removes a checkpoint; a kill in between leaves nothing that looks like one."""
    self._verified.discard(step)
    folder = self._directory / str(step)
    if folder.exists():
      dropped = folder.with_name(f'{step}.dropped')
      shutil.rmtree(dropped, ignore_errors=True)  # best effort: the next start removes the rest
      folder.rename(dropped)
      shutil.rmtree(dropped, ignore_errors=True)

  def _quarantine(self, step: int) -> Path:
    target = self._directory.with_name(DAMAGED) / f'{step}-{time.strftime("%Y%m%d-%H%M%S")}'
    target.parent.mkdir(exist_ok=True)
    return (self._directory / str(step)).rename(target)

  def _unfit(self, step: int, reason: str) -> UserError:
    return UserError('checkpoint', str(self._directory / str(step)), f'an intact checkpoint of this config; {reason}')

  def _as_user_error(self, error: Exception) -> Exception:
    """Returns a UserError for a failure of the disk or of another process, and any other error as it is."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, 'errno', None) in full or any(os.strerror(code) in str(error) for code in full):  # TensorStore has only texts
      return UserError('checkpoint', str(self._directory), 'a disk with space left')
    if 'DEADLINE_EXCEEDED' in str(error):
      return UserError('checkpoint', str(self._directory), 'a save that all processes complete; another process failed')
    if isinstance(error, OSError) or 'PERMISSION_DENIED' in str(error) or 'NOT_FOUND' in str(error):
      return UserError('checkpoint', str(self._directory), f'a writable folder; {" ".join(str(error).split())[:200]}')
    return error


def _lower_priority() -> None:
  """Lets this thread, and those that it starts, use only the processor time that training leaves."""
  if sys.platform == 'linux':  # elsewhere this would affect the complete process
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _best(losses: Mapping[int, float]) -> int:
  """Returns the step with the lowest loss; of equal ones the newest."""
  return min(losses, key=lambda step: (losses[step], -step))


def _context(partial: bool = False) -> ocp.Context:
  context = ocp.Context()
  # Weights do not compress, and without compression a save needs no second copy of the state in memory.
  context.array.saving.use_compression = False
  context.pytree.loading.partial_load = partial
  return context
