"""How a run starts: its workdir is locked and its config compared with the one that the workdir was started with; its state is restored
from a checkpoint, made from the parameters of another run, or fresh."""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec

from gptjax import config as configs
from gptjax.checkpoint import BASE, PARAMETERS, REFERENCE, TEACHER, Checkpoints, Progress, base_of, by_name, keep_run, parameter_reader
from gptjax.checkpoint.manifest import MANIFEST
from gptjax.config import TRAINING_ONLY, Config, UserError, in_unit_of_steps, read_config
from gptjax.data import Prepared, Tokenizer, export, load_tokenizer
from gptjax.distributed import broadcast
from gptjax.files import expanded, write_atomic
from gptjax.model import AbstractModel, stack_layers, stored_model, unstack_layers
from gptjax.training.run import Run, in_steps
from gptjax.training.step import TrainState

FREE = ('batch_size', 'microbatches', 'gradient_noise', 'zero_stage', 'mesh.', 'pipeline.', 'compute.', 'eval.', 'checkpoint.', 'faults.',
        'data.source.path', 'data.source.skip', 'data.tokenizer.path', 'data.prefetch', 'data.workers')
"""Fields that a resumed run may change: they affect neither the results, up to rounding, nor the order of the rows."""
_PRECISION = 'compute.dtype'
"""Changes the rounding, so a change takes --accept_changes."""
_STRUCTURE = ('model.', 'optimizer.name', 'frozen', 'lora.', 'objective.teacher')
"""Fields that decide which arrays a workdir has, as data.context does with learned positions; a run cannot change them, except for
dropout."""
COLUMNS = 'log_probabilities'
"""Folder of a workdir with the log-probabilities under the reference, a file per set of rows."""
_RESIZED = ('vocab', 'positions', 'layers')
"""Logical axes of which init_partial takes a part: the first rows of a table, the first layers of a stack."""


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Creates a workdir and locks it, or raises a UserError if another run holds the lock. The system releases it with this process."""
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / 'lock').open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise UserError('--workdir', str(workdir), f'a folder that no other run uses; this one is locked by {file.read().strip()}') from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
    file.flush()
    try:
      yield
    finally:
      if not (workdir / 'config.json').exists():  # a mistake ended the run before it started
        (workdir / 'lock').unlink(missing_ok=True)
        with contextlib.suppress(OSError):
          workdir.rmdir()


def open_workdir(workdir: Path, run: Run, data: Prepared, done: Progress | None, accept: bool) -> list[str]:
  """Checks that a workdir belongs to this run, stores config and data description in it, and returns descriptions of what changed.

  Raises a UserError that lists all changes if one is not allowed; `accept` allows changes that affect the results. `done` is the progress
  of the workdir's checkpoint; if there is none, any run may start.
  """
  config = run.config
  old = read_config(workdir / 'checkpoints' / str(done.step)) if done else config
  different = configs.differences(old, config)
  vocabulary = different.pop('model.vocab_size', None)  # reported last: it follows from tokenizer and text
  _ignore_moved_stores(different)
  if 'batch_size' in different and any(in_unit_of_steps(phase.start) for phase in config.data.phases):
    raise UserError('batch_size', config.batch_size, f'{old.batch_size}, with which this workdir was started, where data.phases start at '
                    "steps; phases that start at '1e9 tokens' do not depend on it")
  bound = {name: change for name, change in different.items() if not name.startswith(FREE) or name in (_PRECISION, *_STRUCTURE)}
  if done and _open_ended(old, run, done):
    bound.pop('steps', None)
  opt = config.optimizer
  if 'batch_size' in different and not all(in_unit_of_steps(value) for value in (config.steps, opt.warmup, opt.decay) if value):
    bound['batch_size'] = different['batch_size']  # the same epochs or tokens are another number of steps
  structure = (*_STRUCTURE, 'data.context') if config.model.positions == 'learned' else _STRUCTURE
  never = {name: change for name, change in bound.items() if name.startswith(structure) and name not in TRAINING_ONLY}
  if never or (bound and not accept):
    raise _another_run(never or bound, bound, accepted=not (never or vocabulary))
  if done and config.objective.kind == 'distillation' and not (workdir / TEACHER).exists():
    raise UserError('objective.kind', 'distillation', f'{old.objective.kind!r}, with which this workdir was started: it has no teacher')
  if done and config.objective.needs_reference and not (workdir / REFERENCE).exists():
    field, was = ('kl', old.objective.kl) if config.objective.kind == 'grpo' else ('loss', old.objective.loss)
    raise UserError(f'objective.{field}', getattr(config.objective, field),
                    f'{was!r}, with which this workdir was started: it has no reference')
  export(data, workdir / 'data', replace=(accept and not vocabulary) or not done)
  if vocabulary:
    raise _another_run({'model.vocab_size': vocabulary}, {}, accepted=False)
  write_atomic(workdir / 'config.json', configs.to_json(config))
  return [f'{name} {was} -> {now}' for name, (was, now) in different.items()]


def wait_until_visible(workdir: Path) -> None:
  """Waits until this process sees the workdir that process 0 has written."""
  broadcast('workdir')
  deadline = time.monotonic() + 60  # network file systems may cache for so long that a file did not exist
  while not (workdir / 'config.json').exists():
    if time.monotonic() > deadline:
      raise UserError('--workdir', str(workdir), 'a folder that all processes share; config.json of process 0 is not visible here')
    time.sleep(0.1)


def _open_ended(old: Config, run: Run, done: Progress) -> bool:
  """Whether the learning rate so far is the same with the new number of steps."""
  opt = run.config.optimizer
  if opt.schedule == 'constant':
    return True
  if opt.schedule != 'wsd' or old.optimizer.schedule != 'wsd':
    return False
  begins = lambda config: in_steps(config, run.rows, 'steps') - in_steps(config, run.rows, 'optimizer.decay')
  return done.step <= min(begins(old), begins(run.config))


def _ignore_moved_stores(different: dict[str, tuple]) -> None:
  """Removes changes of a store's location; its content is part of the data's fingerprint."""
  for name in ('data.train', 'data.valid'):
    was, now = different.get(name, ((), ()))
    if name in different and [dataclasses.replace(one, store='') for one in was] == [dataclasses.replace(one, store='') for one in now]:
      del different[name]


def _another_run(worst: dict[str, tuple], changes: dict[str, tuple], *, accepted: bool) -> UserError:
  name, (was, now) = next(iter(worst.items()))
  every = '; '.join(f'{name} {was!r} -> {now!r}' for name, (was, now) in changes.items())
  ways = 'another --workdir for another run' + (', or --accept_changes to resume anyway' if accepted else ', which may start from the '
                                                'parameters of this one that fit (init_from, init_partial)')
  more = f'; all changes: {every}' if len(changes) > 1 else ''
  return UserError(name, now, f'{was!r}, with which this workdir was started; {ways}{more}')


def restore(checkpoints: Checkpoints, step: int, run: Run) -> tuple[TrainState, Progress]:
  """The state of a checkpoint, with layers stacked or not as `compute.scan` is now; a UserError if it is damaged, or of another model."""
  before, standard, wanted = stored_model(read_config(checkpoints.folder(step))), run.standard, run.abstract_state
  saved = wanted._replace(frozen={}) if run.config.lora.rank else wanted
  if standard.is_in_order and before.is_stacked == run.model.is_stacked:
    state, progress = checkpoints.restore(step, saved)
  else:
    stored, progress = checkpoints.restore(step, standard.abstract_state(before))
    state = standard.enter(by_name(stored), saved)
  return (state._replace(frozen=_base(checkpoints, run)) if run.config.lora.rank else state), progress


def _base(checkpoints: Checkpoints, run: Run) -> dict[str, jax.Array]:
  """The parameters that adapters leave as they are."""
  wanted = run.abstract_state.frozen
  with jax.set_mesh(run.standard.mesh):
    found = Source(base_of(checkpoints.directory)).parameters(run)
  return {name: jax.device_put(found[name], leaf.sharding) for name, leaf in wanted.items()} if run.standard.mesh == run.mesh else (
    run.standard.enter(found, wanted))


def starting_point(run: Run) -> 'Source | None':
  """The checkpoint that init_from names; None if parameters are fresh. All processes must call this."""
  return Source(expanded(run.config.init_from)) if run.config.init_from else None


def initial_state(run: Run, tokenizer: Tokenizer, source: 'Source | None' = None) -> tuple[TrainState, str]:
  """The state of step 0, and a description of its parameters; `source` is the `starting_point`, by default as it is now.

  They are fresh, or those of `init_from`: a workdir, of which the newest checkpoint is taken, or the folder of one checkpoint. Raises a
  UserError if there is no such checkpoint, or if it fits only in part and the config does not allow that by `init_partial`.
  """
  path, standard, source = run.config.init_from, run.standard, source or starting_point(run)
  if source is None:
    return run.initialize(), 'fresh parameters'
  if run.config.lora.rank and source.config.lora.rank and source.config.lora != run.config.lora:
    raise UserError('init_from', path, 'a run without adapters (tools.merge_lora makes one of it), or the lora.rank, alpha, stabilized and '
                    'targets of its adapters, to go on with them')
  source_tokenizer = load_tokenizer(source.tokenizer)
  new_head = bool(run.config.model.classes and not source.config.model.classes)
  differences = _differences(standard.model.base, source.in_layout(run)(source.model.shapes), new_head)
  if source_tokenizer.sha256 != tokenizer.sha256:
    differences = [f'another tokenizer, of {source_tokenizer.vocab_size:,} ids (data.tokenizer.path={source.tokenizer})', *differences]
  if differences and not run.config.init_partial:
    raise UserError('init_from', path, 'a run with the same parameters and tokenizer, or --config.init_partial for the parts that fit: '
                    f'{_listed(differences)}')
  state = run.initialize()
  initial = standard.parameters(state.parameters)
  with jax.set_mesh(standard.mesh):
    found = source.parameters(run)
    parameters = {name: _combined(fresh, found.pop(name, None)) for name, fresh in initial.items()}
  if standard.mesh != run.mesh:
    parameters = standard.enter(parameters, run.abstract_state.parameters)
  take = lambda names: {name: parameters[name] for name in names}
  words = f'parameters of {path}, step {source.step}' + (f', in part: {_listed(differences)}' if differences else '')
  return state._replace(trained=take(state.trained), frozen=take(state.frozen)), words


class Source:
  """One checkpoint, or a workdir's newest, that another run reads parameters from. Raises a UserError, of a config's field, if there is
  none."""

  def __init__(self, path: Path, field: str = 'init_from'):
    if (path / MANIFEST).exists() and path.name.isdecimal():
      folder, directory, self.tokenizer = path, path.parent, path / 'tokenizer'
    elif (path / 'config.json').exists():
      folder, directory, self.tokenizer = path, path / 'checkpoints', path / 'data' / 'tokenizer'
    else:
      raise UserError(field, str(path), 'a folder that gptjax.train or tools.import_hf made, or one of its checkpoints/STEP')
    self.config = read_config(folder)
    self.model = stored_model(self.config).base
    self.checkpoints = parameter_reader(directory, self.config)
    self.base: Source | None = Source(base_of(directory)) if self.config.lora.rank else None
    newest = int(path.name) if folder.parent == directory else self.checkpoints.newest()
    if newest is None:
      raise UserError(field, str(path), 'a run that has a checkpoint')
    self.step: int = newest

  def in_layout(self, run: Run) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that arranges layers as in the standard layout of a run."""
    return stack_layers if run.standard.model.is_stacked else unstack_layers

  def parameters(self, run: Run, merged: bool = False) -> dict[str, jax.Array]:
    """Its parameters on the mesh of the run's standard layout; adapters are merged if that is asked for, or the run has none."""
    if self.base is None or not run.config.lora.rank or merged:
      return self._restored(run, self.checkpoints, self.model, self.model.shapes)
    model, own = stored_model(self.config), Checkpoints(self.checkpoints.directory, folders=(PARAMETERS,))
    return self.base.parameters(run) | self._restored(run, own, model, model.trained_with_adapters)

  def _restored(self, run: Run, checkpoints: Checkpoints, model: AbstractModel, names: Iterable[str]) -> dict[str, jax.Array]:
    shardings = model.shardings(3, run.standard.mesh)
    return self.in_layout(run)(checkpoints.restore_parameters(self.step, {
      name: jax.ShapeDtypeStruct(model.shapes[name].shape, model.shapes[name].dtype, sharding=shardings[name]) for name in names}))


def keep_sources(run: Run, workdir: Path, source: 'Source | None', teacher: 'Source | None') -> None:
  """Keeps what a new run reads again in its workdir: the base of its adapters, the reference and the teacher of its objective."""
  shutil.rmtree(workdir / COLUMNS, ignore_errors=True)  # of a run that ended before its first checkpoint
  base, reference = run.config.lora.rank > 0, run.config.objective.needs_reference
  for folder, one in ((BASE, source and base and (source.base or source)), (REFERENCE, reference and source), (TEACHER, teacher)):
    if one:
      keep_run(one.checkpoints.folder(one.step), one.config, workdir / folder)


def _differences(model: AbstractModel, found: Mapping[str, jax.ShapeDtypeStruct], new_head: bool) -> list[str]:
  """Descriptions of parameters that are missing, superfluous or of another size; a UserError if a part cannot be taken.

  `new_head`: a model that predicts tokens becomes one that classifies, with a fresh head in place of the other, which is no difference.
  """
  words, heads = [], ('lm_head/kernel', 'classifier/kernel') if new_head else ()
  for name, shape in model.shapes.items():
    if name in found and found[name].shape != shape.shape:
      words.append(f'{name} {list(found[name].shape)} for {list(shape.shape)}')
      if found[name].ndim != shape.ndim or any(
          ours != theirs and (axis[0] if isinstance(axis, tuple) else axis) not in _RESIZED
          for ours, theirs, axis in zip(shape.shape, found[name].shape, model.axes[name])):
        raise UserError('init_from', words[-1], 'the same sizes; only vocabulary, positions and the number of layers may differ')
  words += [f'no {name}' for name in model.shapes if name not in found and name not in heads]
  return words + [f'{name} left out' for name in found if name not in model.shapes and name not in heads]


def _combined(fresh: jax.Array, found: jax.Array | None) -> jax.Array:
  """A fresh parameter with the found values in place of its first ones."""
  if found is None:
    return fresh
  if found.shape == fresh.shape:
    return jax.device_put(found, fresh.sharding)
  part = tuple(slice(min(sizes)) for sizes in zip(fresh.shape, found.shape))

  @jax.jit
  def combine(fresh, found):
    complete, other = (jax.reshard(x, PartitionSpec()) for x in (fresh, found))  # parts of a split axis would have to move
    return jax.reshard(complete.at[part].set(other[part]), jax.typeof(fresh).sharding.spec)

  return combine(fresh, found)


def _listed(words: list[str]) -> str:
  return '; '.join(words[:6]) + (f' and {len(words) - 6} more' if len(words) > 6 else '')
