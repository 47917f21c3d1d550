"""Checkpoints of a run: Orbax writes and reads the arrays; what is a checkpoint, and which are kept, is told here.

A checkpoint is a folder named after its step. It appears by one rename, when every file, with a manifest of their checksums, is on
the disk; it is compared with its manifest before anything of it is used, since Orbax loads a flipped bit without a word.
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

from gptjax.checkpoint.staging import HostStaging
from gptjax.checkpoint.checksums import StreamingChecksums
from gptjax.checkpoint.manifest import Damaged, read_manifest, verify, write_manifest
from gptjax.config import Fault, UserError
from gptjax.data.progress import announce
from gptjax.files import sync
from gptjax.model import Parameters
from gptjax.distributed import process_group, is_primary, all_gather, broadcast

DAMAGED = 'damaged'
"""Folder beside the checkpoints where damaged ones are put."""


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far a run is: what a checkpoint holds beside the arrays."""

  step: int = 0
  """updates done"""
  rows: int = 0
  """rows of data taken; the whole state of the data"""
  tokens: int = 0
  """targets seen; more than an int32 on a device could count"""


@dataclasses.dataclass(frozen=True)
class Retention:
  """Which checkpoints stay when a newer one is there."""

  latest: int = 2
  """so many of the newest; 0: all"""
  every: int = 0
  """those whose step is a multiple of it; 0: none for that"""
  best: bool = False
  """the one with the lowest validation loss"""

  def kept(self, losses: Mapping[int, float | None]) -> set[int]:
    """Of checkpoints with their losses, those that stay."""
    steps = sorted(losses)
    kept = set(steps[-self.latest:]) | {step for step in steps if self.every and step % self.every == 0}
    scored = {step: loss for step, loss in losses.items() if loss is not None}
    return kept | ({_best(scored)} if self.best and scored else set())


class Checkpoints:
  """The checkpoints of one folder; saving goes on in the background.

  Args:
    directory: made by the first save.
    retention: None: for reading only. With it this is the one run that writes here, and what killed ones left is removed.
    beside: files and folders that each checkpoint holds a copy of.
  """

  def __init__(self, directory: Path, retention: Retention | None = None, beside: tuple[Path, ...] = ()):
    self._directory, self._retention, self._beside = directory.absolute(), retention, beside
    self._pending: Future | None = None
    self._whole: set[int] = set()  # compared with their manifests
    self._staging = HostStaging()
    self._background = ThreadPoolExecutor(1, 'checkpoints', _yield_to_training)
    if retention and is_primary() and directory.exists():
      for path in directory.iterdir():
        if '.saving' in path.name or '.dropped' in path.name:
          shutil.rmtree(path)

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, damaged or not, oldest first."""
    names = [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

  def newest(self, below: int | None = None) -> int | None:
    """The newest step, or the newest below one, whose checkpoint is as it was written; to be called by all processes.

    Newer ones that are damaged are told and, by a run that writes here, put into the folder `damaged` beside.

    Raises:
      UserError: there are checkpoints, and all are damaged; they stay where they are.
      OSError: one cannot be read, which may pass.
    """
    damaged: dict[int, str] = {}
    for step in reversed([step for step in self._listed() if below is None or step < below]):
      wrong = self._wrong(step)
      if not wrong:
        for other, words in damaged.items() if is_primary() else ():
          what = f'put into {self._set_aside(other)}' if self._retention else 'passed over'
          announce(f'checkpoint {other} is damaged: {words}; {what}')
        return step
      if step not in self._listed():  # the run that writes here removed it meanwhile, and has newer ones
        return self.newest(below)
      damaged[step] = wrong
    if damaged:
      told = '; '.join(f'{step}: {words}' for step, words in damaged.items())
      raise UserError('checkpoint', str(self._directory), f'a checkpoint that is not damaged, and all are ({told})')
    return None

  def _listed(self) -> list[int]:
    """`steps` as process 0 sees them."""
    return broadcast('checkpoints', self.steps())

  def resolve(self, wanted: str) -> int:
    """The step that 'latest', 'best' (lowest validation loss) or a number means; to be called by all processes.

    Raises:
      UserError: there is no such checkpoint.
    """
    steps = self._listed()
    if not steps:
      raise UserError('--workdir', str(self._directory.parent), 'a folder with checkpoints, which gptjax.train makes')
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
    """The steps, oldest first, that 'all' means, or a list such as '100,200,best'; to be called by all processes.

    Raises:
      UserError: one of them is not there.
    """
    if wanted == 'all' and (steps := self._listed()):
      return steps
    return sorted({self.resolve(one.strip()) for one in wanted.split(',')})

  def prepare(self, state: Any) -> None:
    """Takes, in the background, the memory that saves of such a state need, for which the first one would have to wait."""
    self._pending = self._background.submit(self._staging.reserve(state))

  def save(self, progress: Progress, state: Any, loss: float | None, waits: bool = False) -> None:
    """Starts to save; a save still running is waited for, and what went wrong with it raised here.

    Args:
      progress: stored beside the state; its step names the checkpoint.
      state: a tree of arrays.
      loss: validation loss at this step, by which the best checkpoint is kept; None: not validated.
      waits: return when it is saved; the state needs no copy then, since nothing else is done with it meanwhile.

    Raises:
      UserError: no space, no leave to write, or no folder; what was saved before stays.
    """
    assert self._retention, 'these checkpoints are for reading'
    self.wait()
    saving = self._directory / f'{progress.step}.saving'
    # Not a number would count as the best of all.
    facts = {'progress': dataclasses.asdict(progress), 'loss': loss if loss is not None and math.isfinite(loss) else None,
             'saved': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}
    try:
      written = self._background.submit(self._begin, saving, state if waits else self._staging.copy(state)).result()
    except Exception as error:
      raise self._explained(error) from error
    self._pending = self._background.submit(self._finish, written, saving, progress.step, facts)
    if waits:
      self.wait()

  def _begin(self, saving: Path, state: Any) -> Callable[[], None]:
    with _context():
      return ocp.save_async(saving, state, overwrite=True).result

  def _finish(self, written: Callable[[], None], saving: Path, step: int, facts: dict[str, Any]) -> None:
    try:
      with StreamingChecksums(saving, process_group().index) as followed:
        written()
      if is_primary():
        self._commit(saving, step, facts, followed.found)
    except BaseException:
      if is_primary():  # the space is for what comes next; threads of Orbax may still write, and the next start removes the rest
        for path in saving.parent.glob(f'{saving.name}*'):
          shutil.rmtree(path, ignore_errors=True)
      raise

  def _commit(self, saving: Path, step: int, facts: dict[str, Any], known: Mapping[int, tuple[int, str]]) -> None:
    if step in self.steps():  # the same, when another process failed; it is done again by all
      shutil.rmtree(saving)
    else:
      for path in self._beside:
        shutil.copytree(path, saving / path.name) if path.is_dir() else shutil.copyfile(path, saving / path.name)
      write_manifest(saving, facts, known)
      saving.rename(self._directory / str(step))
      sync(self._directory)
    assert self._retention
    for old in {*self.steps()} - self._retention.kept(self._losses()):
      self._drop(old)

  def wait(self) -> None:
    """Returns when everything saved is on disk.

    Raises:
      UserError: as for `save`.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      try:
        pending.result()
      except Exception as error:
        raise self._explained(error) from error

  @property
  def saving(self) -> bool:
    """Whether a save is still running; what went wrong with one that is not, `wait` raises."""
    return self._pending is not None and not self._pending.done()

  def restore(self, step: int, state: Any) -> tuple[Any, Progress]:
    """Loads the checkpoint of a step into the shapes, dtypes and shardings of an abstract tree.

    Raises:
      UserError: a checkpoint that is damaged, or of other shapes.
    """
    return self._load(step, state), self.progress(step)

  def progress(self, step: int) -> Progress:
    """How far the run was at a step."""
    return Progress(**self.facts(step)['progress'])

  def facts(self, step: int) -> dict[str, Any]:
    """The progress, validation loss and time of a checkpoint.

    Raises:
      UserError: it is damaged.
    """
    try:
      return read_manifest(self._directory / str(step))['facts']
    except Damaged as damaged:
      raise self._unfit(step, str(damaged)) from None

  def restore_parameters(self, step: int, parameters: dict[str, jax.ShapeDtypeStruct]) -> Parameters:
    """Loads only the parameters of a TrainState, and allocates no optimizer state.

    Raises:
      UserError: a checkpoint that is damaged, or of other shapes.
    """
    return self._load(step, {'parameters': parameters}, partial=True)['parameters']

  def close(self) -> None:
    """Waits and lets go of the folder."""
    try:
      self.wait()
    finally:
      self._background.shutdown()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
    with contextlib.suppress(*[UserError] if error else []):  # the error that ends a run is the one to tell
      self.close()

  def _load(self, step: int, wanted: Any, partial: bool = False) -> Any:
    if wrong := self._wrong(step):
      raise self._unfit(step, f'it is damaged: {wrong}')
    folder = self._directory / str(step)
    asked, found = shapes_of(wanted), shapes_of(ocp.metadata(folder).metadata)
    for name, shape in asked.items():
      if found.get(name) != shape:
        raise self._unfit(step, f'it has {f"{list(found[name])} for {list(shape)}, " if name in found else "no "}{name}')
    if not partial and (more := sorted(found.keys() - asked.keys())):
      raise self._unfit(step, f'it has {", ".join(more[:3])} beside')
    try:
      with _context(partial):
        return ocp.load(folder, wanted)
    except Exception as error:
      # Orbax wraps every failure in one about handlers; the cause is what a person can act on.
      words = ' '.join(str(error.__cause__ or error).split())[:300]
      raise Fault(f'{folder}: {words}, expected: a checkpoint that can be loaded') from error

  def _wrong(self, step: int) -> str:
    """What is wrong with a checkpoint, '' where nothing is; every process reads a part of it."""
    group = process_group()
    mine = '' if step in self._whole else verify(self._directory / str(step), group.index, group.count)
    wrong = next(filter(None, all_gather('damage', mine)), '')
    if not wrong:
      self._whole.add(step)
    return wrong

  def _losses(self) -> dict[int, float | None]:
    losses: dict[int, float | None] = {}
    for step in self.steps():
      try:
        losses[step] = read_manifest(self._directory / str(step))['facts']['loss']
      except (Damaged, OSError):  # told when it is used
        losses[step] = None
    return losses

  def _drop(self, step: int) -> None:
    """Removes a checkpoint; a kill meanwhile leaves nothing that looks like one."""
    self._whole.discard(step)
    folder = self._directory / str(step)
    if folder.exists():
      dropped = folder.with_name(f'{step}.dropped')
      shutil.rmtree(dropped, ignore_errors=True)  # what does not go now, the next start removes: the checkpoint beside it is whole
      folder.rename(dropped)
      shutil.rmtree(dropped, ignore_errors=True)

  def _set_aside(self, step: int) -> Path:
    aside = self._directory.with_name(DAMAGED) / f'{step}-{time.strftime("%Y%m%d-%H%M%S")}'
    aside.parent.mkdir(exist_ok=True)
    (self._directory / str(step)).rename(aside)
    return aside

  def _unfit(self, step: int, reason: str) -> UserError:
    return UserError('checkpoint', str(self._directory / str(step)), f'a whole checkpoint of this config; {reason}')

  def _explained(self, error: Exception) -> Exception:
    """The UserError for what a disk does, which is no fault of ours; any other error as it is."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if getattr(error, 'errno', None) in full or any(os.strerror(code) in str(error) for code in full):  # TensorStore's are texts
      return UserError('checkpoint', str(self._directory), 'a disk with space left')
    if 'DEADLINE_EXCEEDED' in str(error):
      return UserError('checkpoint', str(self._directory), 'a save that all processes finish; another one failed')
    if isinstance(error, OSError) or 'PERMISSION_DENIED' in str(error) or 'NOT_FOUND' in str(error):
      return UserError('checkpoint', str(self._directory), f'a folder that can be written; {" ".join(str(error).split())[:200]}')
    return error


def _yield_to_training() -> None:
  """Gives this thread, and those that it starts, what the others leave of the processor."""
  if sys.platform == 'linux':  # elsewhere it would be the whole process
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _best(losses: Mapping[int, float]) -> int:
  """The step with the lowest loss; of equal ones the newest."""
  return min(losses, key=lambda step: (losses[step], -step))


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
  """The shapes of a tree of arrays, or of Orbax's word of one, by names such as 'parameters/NAME'."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
          for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _context(partial: bool = False) -> ocp.Context:
  context = ocp.Context()
  # Random floats do not compress: without it a save needs no second copy of the state in memory.
  context.array.saving.use_compression = False
  context.pytree.loading.partial_load = partial
  return context
