"""The workdir of a run: one run at a time, and a config that goes on with it only where it would be the same run."""

import contextlib
import dataclasses
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from gptjax import config as configs
from gptjax.checkpoint import Progress
from gptjax.config import Config, UserError, in_unit_of_steps
from gptjax.data import Prepared, export
from gptjax.files import write_atomic
from gptjax.distributed import broadcast
from gptjax.training.run import Run, in_steps

FREE = ('batch_size', 'microbatches', 'zero_stage', 'mesh.', 'eval.', 'checkpoint.', 'faults.', 'compute.attention', 'compute.remat',
        'compute.saved', 'compute.offloaded', 'compute.sequence_parallel', 'data.source.path', 'data.source.skip', 'data.tokenizer.path',
        'data.prefetch', 'data.workers')
"""Fields that change neither what is computed, up to rounding, nor the order of the rows: a resumed run may have others."""
_HOLDABLE = ('model.dropout', 'compute.dtype')
"""Fields of the model that its checkpoints do not depend on."""


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Keeps other runs out of a workdir, which is made; the system lets go of it when this process ends, however it does.

  Raises:
    UserError: another run is there.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / 'lock').open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise UserError('--workdir', str(workdir), f'a folder that no other run works in; in this one is {file.read().strip()}') from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()} since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
    file.flush()
    try:
      yield
    finally:
      if not (workdir / 'config.json').exists():  # a mistake ended the run before it began
        (workdir / 'lock').unlink(missing_ok=True)
        with contextlib.suppress(OSError):
          workdir.rmdir()


def open_workdir(workdir: Path, run: Run, data: Prepared, done: Progress | None, accept: bool) -> list[str]:
  """Makes the workdir self-contained, or checks that it is of this run.

  Args:
    workdir: of the run.
    run, data: as asked for now.
    done: how far the run is; None: it has no checkpoint, and may still be any run.
    accept: whether changes of what is computed are accepted.

  Returns:
    What changed since its checkpoint was made.

  Raises:
    UserError: a change that is not allowed; every one is named.
  """
  config = run.config
  old = configs.read(workdir / 'checkpoints' / str(done.step) / 'config.json') if done else config
  different = configs.differences(old, config)
  vocabulary = different.pop('model.vocab_size', None)  # the last to be told: it follows from tokenizer and text, which say more
  _leave_moved_stores(different)
  if different and 'batch_size' in different and any(in_unit_of_steps(phase.start) for phase in config.data.phases):
    raise UserError('batch_size', config.batch_size, f'{old.batch_size}, with which this workdir was started, where data.phases start at '
                    "steps; phases that start at '1e9 tokens' do not depend on it")
  bound = {name: change for name, change in different.items() if not name.startswith(FREE)}
  if done and _open_ended(old, run, done):
    bound.pop('steps', None)
  if 'microbatches' in different and config.model.dropout:  # each draws its own
    bound['microbatches'] = different['microbatches']
  opt = config.optimizer
  if 'batch_size' in different and not all(in_unit_of_steps(value) for value in (config.steps, opt.warmup, opt.decay) if value):
    bound['batch_size'] = different['batch_size']  # the same epochs or tokens would be other steps
  never = {name: change for name, change in bound.items()
           if name == 'optimizer.name' or (name.startswith('model.') and name not in _HOLDABLE)}
  if never or (bound and not accept):
    raise _another_run(never or bound, bound, accepted=not never)
  export(data, workdir / 'data', replace=(accept and not vocabulary) or not done)
  if vocabulary:
    raise _another_run({'model.vocab_size': vocabulary}, {}, accepted=False)
  write_atomic(workdir / 'config.json', configs.to_json(config))
  return [f'{name} {was} -> {now}' for name, (was, now) in different.items()]


def wait_until_visible(workdir: Path) -> None:
  """Waits until every process sees the workdir as process 0 left it."""
  broadcast('workdir')
  deadline = time.monotonic() + 60  # network file systems may remember for so long that a file was not there
  while not (workdir / 'config.json').exists():
    if time.monotonic() > deadline:
      raise UserError('--workdir', str(workdir), 'a folder of a file system that all processes share; process 0 wrote what is not here')
    time.sleep(0.1)


def _open_ended(old: Config, run: Run, done: Progress) -> bool:
  """Whether the learning rate up to where the run is would have been the same with the steps asked for now."""
  opt = run.config.optimizer
  if opt.schedule == 'constant':
    return True
  if opt.schedule != 'wsd' or old.optimizer.schedule != 'wsd':
    return False
  in_rows = lambda config, field, value: in_steps(config, run.rows, field, value)
  begins = lambda config: in_rows(config, 'steps', config.steps) - in_rows(config, 'optimizer.decay', config.optimizer.decay)
  return done.step <= min(begins(old), begins(run.config))


def _leave_moved_stores(different: dict[str, tuple]) -> None:
  """Takes stores that only moved out of what is different; their content is in the fingerprint of the data."""
  for name in ('data.train', 'data.valid'):
    was, now = different.get(name, ((), ()))
    if name in different and [dataclasses.replace(one, store='') for one in was] == [dataclasses.replace(one, store='') for one in now]:
      del different[name]


def _another_run(worst: dict[str, tuple], changes: dict[str, tuple], *, accepted: bool) -> UserError:
  name, (was, now) = next(iter(worst.items()))
  every = '; '.join(f'{name} {was!r} -> {now!r}' for name, (was, now) in changes.items())
  ways = 'another --workdir for another run' + (', or --accept_changes to go on all the same' if accepted else ', which may begin with '
                                                'the weights of this one (init_from)')
  more = f'; all changes: {every}' if len(changes) > 1 else ''
  return UserError(name, now, f'{was!r}, with which this workdir was started; {ways}{more}')

