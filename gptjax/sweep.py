"""Trains every config of a sweep: python -m gptjax.sweep --sweep=experiments/NAME/sweep.py --out=DIR --workers=4"""

import gptjax.program  # noqa: F401  (first: it handles signals)
import collections
import json
import os
import shlex
import sys
import threading
import time

from absl import flags

from gptjax import config as configs
from gptjax.files import expanded

_SWEEP = flags.DEFINE_string('sweep', None, 'a Python file with get_sweep() -> gptjax.sweeps.Sweep', required=True)
_OUT = flags.DEFINE_string('out', None, 'folder of the sweep, which all workers share: trials.csv, report.html, and trials/ with a workdir '
                           'per trial', required=True)
_WORKERS = flags.DEFINE_integer('workers', 1, 'trials that run at a time on this machine, among which its cores and GPUs are divided; TPU '
                                'chips are given one per worker; the same command on other machines, or in tasks of a Slurm array, adds '
                                'workers', lower_bound=1)
_DRY_RUN = flags.DEFINE_bool('dry_run', False, 'print the trials with their parameters, FLOPs and an estimate of the time; train nothing')
_RETRY_FAILED = flags.DEFINE_bool('retry_failed', False, 'run trials again that failed')
_HEARTBEAT = flags.DEFINE_float('heartbeat', 10.0, 'seconds between signs of life of a worker; a trial of a worker that gives none for 1.5 '
                                'times as long is taken over', lower_bound=0.1)
_TRAIN_FLAGS = flags.DEFINE_string('train_flags', '', "more flags of gptjax.train for all trials, such as '--log_every=100'")
_ALLOWED = 'log_every', 'cache_dir', 'hang_timeout', 'reward_file', 'cpu_devices'
"""of _TRAIN_FLAGS"""


def main(_: object) -> int:
  from gptjax import sweeps
  from gptjax.sweeps import report
  path, out = expanded(_SWEEP.value, '--sweep'), expanded(_OUT.value, '--out')
  if out.is_file():
    raise configs.UserError('--out', str(out), 'a folder')
  _train_flags()  # a mistake is reported before anything starts
  sweep = sweeps.load_sweep(path)
  queue = sweeps.Queue(sweep, path, out, _HEARTBEAT.value)
  if _DRY_RUN.value:
    from gptjax.sweeps.estimate import described
    print(described(queue, _WORKERS.value))
    return 0
  (out / 'trials').mkdir(parents=True, exist_ok=True)
  _check_same(sweep, out)
  if _RETRY_FAILED.value:
    queue.forget_failures()
  if older := sweeps.of_other_code(queue):
    print(f'{len(older):,} trials were trained by other code, {older[0]} for one; another --out trains them again', file=sys.stderr)
  interrupted = _work(queue, sweeps.places(_WORKERS.value), out)
  statuses = [sweeps.status_of(queue.folder(trial)) for trial in queue.trials]
  sweeps.write_table(out / 'trials.csv', sweep, queue.trials, statuses)
  if interrupted:
    return os.EX_TEMPFAIL
  report.write(queue, statuses, out)
  print(f'{_counted(statuses)}; see {out / "report.html"}', flush=True)
  return 1 if any(status.name == 'failed' for status in statuses) else 0


def _check_same(sweep, out) -> None:
  """Raises a UserError if other choices were made in the folder, whose values cannot be compared with those of this sweep."""
  from gptjax.files import read_json
  from gptjax.sweeps.results import write_shared
  now = {'recipe': sweep.recipe, 'metric': sweep.metric, 'maximize': sweep.maximize, 'halving': repr(sweep.halving)}
  if (out / 'sweep.json').exists():
    for name, value in read_json(out / 'sweep.json').items():
      if now[name] != value:
        raise configs.UserError(name, now[name], f'{value!r}, with which {out} was started; another --out for another sweep')
  write_shared(out / 'sweep.json', json.dumps(now))


def _train_flags() -> list[str]:
  """--train_flags as a list; a UserError for one that would make a trial another one."""
  try:
    found = shlex.split(_TRAIN_FLAGS.value)
  except ValueError as error:
    raise configs.UserError('--train_flags', _TRAIN_FLAGS.value, f'flags as a shell reads them ({error})') from None
  for flag in found:
    if flag.lstrip('-').partition('=')[0] not in _ALLOWED or '=' not in flag:
      raise configs.UserError('--train_flags', flag, f'{", ".join(f"--{name}=VALUE" for name in _ALLOWED)}; the sweep sets '
                              'fields of the config')
  return found


def _work(queue, places, out):
  """Runs workers until the sweep is over; returns the signal that ended it before."""
  from gptjax import sweeps
  stop, lock, failures = threading.Event(), threading.Lock(), []
  board = _Board(queue)

  def work(place) -> None:
    try:
      sweeps.Worker(queue, lock, place, _train_flags(), _HEARTBEAT.value, stop, board.say).run()
    except BaseException as error:
      failures.append(error)
      stop.set()

  threads = [threading.Thread(target=work, args=(place,), name=f'worker {number}') for number, place in enumerate(places)]
  interrupted = None
  with board:
    try:
      for thread in threads:
        thread.start()
      while any(thread.is_alive() for thread in threads):
        threads[0].join(0.5)
        time.sleep(0.05)
        board.show(lock, out)
    except KeyboardInterrupt as error:
      interrupted = error
      board.say(f'{error}: trials that run are being saved; the same command goes on')
    finally:
      stop.set()
      for thread in threads:
        if thread.ident:
          thread.join()
  if failures:
    raise failures[0]
  return interrupted


class _Board:
  """What all trials do, as a table in a terminal and as lines elsewhere, and in trials.csv."""

  _PERIOD = 5.0
  """seconds between looks at all trials"""

  def __init__(self, queue):
    from rich.console import Console
    from rich.live import Live
    self._queue, self._console = queue, Console(stderr=True, highlight=False, soft_wrap=True)
    self._live = Live(console=self._console, auto_refresh=False, transient=True) if sys.stderr.isatty() else None
    self._looked = 0.0

  def __enter__(self) -> '_Board':
    if self._live:
      self._live.start()
    return self

  def __exit__(self, *_: object) -> None:
    if self._live:
      self._live.stop()

  def say(self, line: str) -> None:
    """Prints a line above the table."""
    self._console.print(line, markup=False)

  def show(self, lock: threading.Lock, out) -> None:
    """Looks at the trials if it is time to."""
    if time.monotonic() - self._looked < self._PERIOD:
      return
    from gptjax import sweeps
    with lock:  # an adaptive queue adds trials
      trials = list(self._queue.trials)
    statuses = [sweeps.status_of(self._queue.folder(trial)) for trial in trials]
    sweeps.write_table(out / 'trials.csv', self._queue.sweep, trials, statuses)
    if self._live:
      self._live.update(_table(trials, statuses, self._queue.sweep), refresh=True)
    self._looked = time.monotonic()


def _table(trials, statuses, sweep):
  """The trials that run, the best of those that are done, and counts."""
  from rich.table import Table
  table = Table(box=None, title=_counted(statuses), title_justify='left')
  for name in ('trial', 'status', 'step', 'loss', sweep.metric):
    table.add_column(name, no_wrap=True)
  sign = -1 if sweep.maximize else 1
  pairs = list(zip(trials, statuses))
  running = [pair for pair in pairs if pair[1].name == 'running']
  scores = [(sign * value, pair) for pair in pairs if pair[1].name == 'done' and (value := pair[1].metrics.get(sweep.metric)) is not None]
  done = [pair for _, pair in sorted(scores, key=lambda score: score[0])]
  for trial, status in running[:10] + done[:5]:
    step, *figures = (status.metrics.get(name) for name in ('step', 'loss', sweep.metric))
    table.add_row(trial.name, status.name, str(step or ''), *('' if one is None else f'{one:.4f}' for one in figures))
  return table


def _counted(statuses) -> str:
  """'12 done, 4 running, 8 waiting'."""
  counts = collections.Counter(status.name for status in statuses)
  return ', '.join(f'{counts[name]:,} {name}' for name in sorted(counts)) or 'no trials'


def script() -> None:
  """The command gptjax-sweep."""
  configs.run(main, needs_config=False)


if __name__ == '__main__':
  script()
