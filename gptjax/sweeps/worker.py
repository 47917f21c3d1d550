"""Workers: each claims a trial, runs it as a process of its own, records how it ended, and takes the next."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from gptjax import config as configs
from gptjax.config import UserError
from gptjax.files import read_json, write_atomic, write_json
from gptjax.sweeps.queue import Job, Queue
from gptjax.sweeps.results import add_rung, end_trial, metric_of, spent, status_of

PROGRAM = '-m', 'gptjax.train'
"""Arguments of Python that train a trial."""
_LIBC = ctypes.CDLL(None)
_POLL = 0.1
"""Seconds between looks at a trial's process."""
_LINES = 8
"""Lines of the log of a failed trial that are shown."""


class Place(NamedTuple):
  """The part of a machine that a worker uses."""

  cores: Sequence[int]
  environment: dict[str, str]


def places(workers: int) -> list[Place]:
  """Divides this machine's cores, and its GPUs or TPU chips if there are any, among workers. Raises a UserError if these are too few."""
  cores = sorted(os.sched_getaffinity(0))
  name, devices = _accelerators()
  if devices and workers > len(devices):
    raise UserError('--workers', workers, f'at most {len(devices)}, the number of accelerators of this machine')
  is_tpu = name.startswith('TPU')
  if is_tpu and workers not in (1, len(devices)):  # how several chips of one process are wired depends on the host
    raise UserError('--workers', workers, f'1 or {len(devices)}: all TPU chips of this machine for one trial, or one for each')

  def environment(worker: int) -> dict[str, str]:
    mine = devices[worker::workers] if workers > 1 else []
    one_chip = {'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,1,1', 'TPU_PROCESS_BOUNDS': '1,1,1'} if is_tpu else {}
    return {name: ','.join(mine), **one_chip} if mine else {}

  return [Place(cores[worker::workers] or [cores[worker % len(cores)]], environment(worker)) for worker in range(workers)]


def _accelerators() -> tuple[str, list[str]]:
  visible = os.environ.get('CUDA_VISIBLE_DEVICES')
  if visible is not None:  # an empty one hides all GPUs
    return 'CUDA_VISIBLE_DEVICES', [one for one in visible.split(',') if one.strip() not in ('', '-1')]
  for name, pattern in (('CUDA_VISIBLE_DEVICES', 'nvidia[0-9]*'), ('TPU_VISIBLE_CHIPS', 'accel[0-9]*'),
                        ('TPU_VISIBLE_CHIPS', 'vfio/[0-9]*')):
    if found := list(Path('/dev').glob(pattern)):
      return name, list(map(str, range(len(found))))
  return '', []


class Worker:
  """Runs trials of a queue, which other workers of this process share, until there are none, or `stop` is set.

  Args:
    flags: more of gptjax.train.
    say: prints a line.
  """

  def __init__(self, queue: Queue, lock: threading.Lock, place: Place, flags: Sequence[str], beat: float, stop: threading.Event,
               say: Callable[[str], None]):
    self._queue, self._lock, self._place, self._flags = queue, lock, place, flags
    self._beat, self._stop, self._say = beat, stop, say

  def run(self) -> None:
    """Works until the sweep is over."""
    while not self._stop.is_set():
      with self._lock:
        job = self._queue.next()
        over = job is None and self._queue.is_over() and (job := self._queue.next()) is None
      if over:
        return
      if job is None:
        self._stop.wait(self._beat / 4)  # others run the last ones; one may die
        continue
      self._run(job)

  def _run(self, job: Job) -> None:
    begun = time.monotonic()
    while _is_in_use(job.folder) and job.claim.beat() and not self._stop.is_set():
      time.sleep(_POLL)
    if self._stop.is_set() or not job.claim.beat():
      return job.claim.release()
    self._describe(job)
    self._say(f'started  {job.trial.name}' + (f' to step {job.stop_at}' if job.stop_at else ''))
    log = job.folder / 'log.txt'
    logged = log.stat().st_size if log.exists() else 0
    command = [sys.executable, *PROGRAM, f'--config={job.folder / "trial_config.json"}', f'--workdir={job.folder}', '--cluster=none',
               *self._flags, *([f'--stop_at={job.stop_at}'] if job.stop_at else [])]
    with log.open('ab') as file:
      process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                 env={**os.environ, **self._place.environment}, preexec_fn=_die_with_parent)
    with contextlib.suppress(ProcessLookupError):  # one that has ended already
      os.sched_setaffinity(process.pid, self._place.cores)  # before it starts threads
    if self._watched(process, job):
      self._record(job, process.returncode, time.monotonic() - begun, logged)
    elif job.claim.beat():
      spent(job.folder, time.monotonic() - begun)
    job.claim.release()

  def _watched(self, process: subprocess.Popen, job: Job) -> bool:
    """Waits for a trial's process; returns whether it is for this worker to say how it ended."""
    beat, stopping = time.monotonic(), False
    while process.poll() is None:
      if self._stop.is_set() and not stopping:
        stopping = True
        process.terminate()  # it saves
      if time.monotonic() - beat >= self._beat / 4:
        beat = time.monotonic()
        if not job.claim.beat():  # this process slept, and another worker goes on with the trial
          process.kill()
          process.wait()
          self._say(f'lost     {job.trial.name} to another worker')
          return False
      time.sleep(_POLL)
    return process.returncode != os.EX_TEMPFAIL and not (stopping and process.returncode) and job.claim.beat()

  def _record(self, job: Job, status: int, seconds: float, logged: int) -> None:
    """Records how a process ended, whose log begins after `logged` bytes."""
    error = ''
    try:
      value = metric_of(self._queue.sweep, job.folder, job.stop_at) if status == 0 else 0.0
      if status == 0 and job.stop_at:
        add_rung(job.folder, job.stop_at, value)
        spent(job.folder, seconds)
        return self._say(f'paused   {job.trial.name} at step {job.stop_at}, {self._shown(value)}')
    except UserError as wrong:
      status, error = 2, str(wrong)
    if status == 0:
      end_trial(job.folder, 'done', seconds)
      return self._say(f'done     {job.trial.name}, {self._shown(value)}')
    lines = (job.folder / 'log.txt').read_bytes()[logged:].decode(errors='replace').splitlines()[-_LINES:]
    reason = f'signal {signal.Signals(-status).name}' if status < 0 else f'status {status}'
    end_trial(job.folder, 'failed', seconds, error or f'{reason}: {lines[-1] if lines else ""}')
    shown = [f'failed   {job.trial.name} with {reason}; the end of its log:', *(f'  {line}' for line in lines), error]
    self._say('\n'.join(shown).rstrip())

  def _shown(self, value: float) -> str:
    sweep = self._queue.sweep
    return f'{sweep.metric} {-value if sweep.maximize else value:.4f}'

  def _describe(self, job: Job) -> None:
    """Writes what the trial is, and what runs it."""
    write_atomic(job.folder / 'trial_config.json', configs.to_json(job.trial.config))
    write_json(job.folder / 'trial.json', {
      'trial': job.trial.name, 'recipe': self._queue.sweep.recipe, 'overrides': job.trial.point, 'flags': self._flags, **environment()})


def _is_in_use(folder: Path) -> bool:
  """Whether a process still trains in a workdir: that of a worker which slept, and was taken for dead."""
  try:
    with (folder / 'lock').open('r+') as file:  # on NFS an exclusive lock needs a file that can be written
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except BlockingIOError:
    return True
  return False


def _die_with_parent() -> None:
  _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the trial of a worker that is killed ends, so that another worker can go on


@functools.cache  # a trial is claimed meanwhile
def environment() -> dict[str, str]:
  """The code, versions and machine of this process."""
  code = hashlib.sha256()
  for file in sorted(Path(configs.__file__).parents[1].rglob('*.py')):
    code.update(file.read_bytes())
  versions = {name: metadata.version(name) for name in ('jax', 'flax', 'optax', 'orbax-checkpoint')}
  return {'code': code.hexdigest()[:12], 'python': platform.python_version(), **versions, 'host': platform.node()}


def of_other_code(queue: Queue) -> list[str]:
  """Names of the trials that are done and whose code was not that of this process."""
  code, done = environment()['code'], [trial for trial in queue.trials if status_of(queue.folder(trial)).name == 'done']
  return [trial.name for trial in done if read_json(queue.folder(trial) / 'trial.json')['code'] != code]
