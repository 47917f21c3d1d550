"""Bars of interruption: after kills, signals and lost peers a run ends like an uninterrupted one."""

import contextlib
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tests.acceptance.disturbed import (
  STEPS,
  committed,
  figures,
  log_of,
  lost,
  recipe,
  resumed_from,
  same_run,
  start,
  start_group,
  step_of,
  step_told,
  until,
  whole,
)
from tests.acceptance.kept_state import kept, same
from tests.acceptance.record import Result, bar, python

_KILLS = 50
_SIGNALS = 20


@bar
def killed_runs(folder: Path) -> Result:
  flags, dice, kills = recipe(folder), random.Random(0), _Kills()
  python('gptjax.train', *flags, f'--workdir={folder}/straight')
  runs = []
  while len(kills.moments) < _KILLS:
    runs.append(folder / f'run-{len(runs)}')
    while len(kills.moments) < _KILLS and kills.start_and_kill(runs[-1], flags, folder, dice):
      pass
  python('gptjax.train', *flags, f'--workdir={runs[-1]}')
  wrong = kills.wrong + [f'{run.name}: {text}' for run in runs if (text := same_run(folder / 'straight', run, flags))]
  return Result(f'{STEPS} steps, a save every 10, killed (-9) at {_KILLS} random moments, at least 15 of them during a save: every rerun '
                'resumes from the newest checkpoint, and no committed one is lost; metrics and train state are bitwise those of an '
                'uninterrupted run',
                f'{len(kills.moments)} kills of {len(runs)} runs, {kills.saving} during a save, {kills.early} before the first step; '
                f'{kills.resumed} reruns checked; {kills.seen} times a checkpoint was there before a kill, lost {kills.lost}; '
                f'{len(figures(runs[-1]))} lines of metrics and the train state of each run '
                + ('equal' if not wrong else '; '.join(wrong[:5])), not wrong and kills.saving >= 15 and len(kills.moments) == _KILLS,
                'kill -9 of python -m gptjax.train --config=RECIPE --workdir=DIR, and the same command again')


class _Kills:
  """Kills of runs, and what was found after each."""

  def __init__(self) -> None:
    self.moments: list[int] = []
    self.wrong: list[str] = []
    self.saving = self.early = self.resumed = self.seen = self.lost = 0

  def start_and_kill(self, workdir: Path, flags: list[str], folder: Path, dice: random.Random) -> bool:
    """Starts the run and kills it at a random moment; returns whether it was not done before."""
    newest, left, log = max(committed(workdir), default=0), _saves(workdir), folder / 'log'
    number = len(self.moments)
    process = start(workdir, flags, log)
    new_saves = lambda: _saves(workdir) - left
    if number % 10 == 0:  # while it starts
      alive = _sleep(process, dice.uniform(0, 8))
    elif number % 2:  # while it saves
      after = newest + dice.choice((0, 10))
      alive = until(lambda: step_told(log) > after and new_saves(), process) and _sleep(process, dice.uniform(0, 0.3))
    else:
      after = newest + dice.randint(0, 24)
      alive = until(lambda: step_told(log) > after, process) and _sleep(process, dice.uniform(0, 0.05))
    seen = committed(workdir)
    process.kill()
    process.wait()
    self._check_start(log, newest)
    if not alive:
      if process.returncode:
        self.wrong.append(f'ended with {process.returncode} by itself: {log.read_text()[-300:]}')
      return False
    gone = lost(workdir, seen)
    self.moments.append(step_told(log))
    self.saving += bool(new_saves())
    self.early += not step_told(log)
    self.seen, self.lost = self.seen + len(seen), self.lost + len(gone)
    self.wrong += [f'checkpoint {step} was lost at step {self.moments[-1]}' for step in gone]
    print(f'kill {number + 1} at step {self.moments[-1]}, checkpoints {seen}, saves {new_saves()}', file=sys.stderr)
    return True

  def _check_start(self, log: Path, newest: int) -> None:
    found = resumed_from(log)
    self.resumed += found is not None
    if found not in (None, newest) or 'Traceback' in log.read_text():
      self.wrong.append(f'went on from {found}, not {newest}: {log.read_text()[-300:]}')


def _saves(workdir: Path) -> set[tuple[str, int]]:
  """Saves that are not done, each folder by its name and inode."""
  found = set()
  for path in (workdir / 'checkpoints').glob('*.saving*'):
    with contextlib.suppress(FileNotFoundError):  # done meanwhile
      found.add((path.name, path.stat().st_ino))
  return found


def _sleep(process: subprocess.Popen, seconds: float) -> bool:
  """Whether the process still runs after so much time."""
  time.sleep(seconds)
  return process.poll() is None


@bar
def signals(folder: Path) -> Result:
  flags, dice, signalled = recipe(folder), random.Random(1), _Signals()
  python('gptjax.train', *flags, f'--workdir={folder}/straight')
  runs: list[Path] = []
  while len(signalled.seconds) < _SIGNALS:
    runs.append(folder / f'run-{len(runs)}')
    while len(signalled.seconds) < _SIGNALS and signalled.start_and_signal(runs[-1], flags, folder, dice):
      pass
  python('gptjax.train', *flags, f'--workdir={runs[-1]}')
  wrong = signalled.wrong + [f'{run.name}: {text}' for run in runs if (text := same_run(folder / 'straight', run, flags))]
  two, wrong_of_two = _one_of_two(folder)
  wrong += wrong_of_two
  times = signalled.seconds
  return Result(f'{STEPS} steps, SIGTERM or SIGINT {_SIGNALS} times at random steps, and to one of 2 processes: status 75, a checkpoint of '
                'the step that is reported and logged last; the same command resumes from it; metrics and train state are bitwise those of '
                'an uninterrupted run',
                f'{len(times)} signals ({signalled.interrupts} SIGINT) to {len(runs)} runs at steps '
                f'{", ".join(map(str, signalled.steps))}: status 75 and saved {signalled.saved}, resumed from there {signalled.resumed}; '
                f'from signal to exit {statistics.median(times):.1f} s in the median, {max(times):.1f} at most; 2 processes: {two}; '
                + ('all equal' if not wrong else '; '.join(wrong[:5])), not wrong and signalled.saved == len(times) == _SIGNALS,
                'kill -TERM of python -m gptjax.train --config=RECIPE --workdir=DIR, and the same command again')


class _Signals:
  """Signals to runs, and what came of each."""

  def __init__(self) -> None:
    self.steps: list[int] = []
    self.seconds: list[float] = []
    self.wrong: list[str] = []
    self.interrupts = self.saved = self.resumed = 0

  def start_and_signal(self, workdir: Path, flags: list[str], folder: Path, dice: random.Random) -> bool:
    """Starts the run and signals at a random step; returns whether it was not done before."""
    newest, log = max(committed(workdir), default=0), folder / 'log'
    number = signal.SIGINT if len(self.seconds) % 5 == 4 else signal.SIGTERM
    process = start(workdir, flags, log)
    after = newest + dice.randint(0, 24)
    alive = until(lambda: step_of(workdir) > after, process) and _sleep(process, dice.uniform(0, 0.2))
    begun = time.monotonic()
    process.send_signal(number)
    status = process.wait()
    seconds, said = time.monotonic() - begun, log.read_text()
    self._check_start(log, newest)
    told = re.search(rf'^{number.name}: saved step (\d+) of {STEPS}, ending', said, re.MULTILINE)
    if not told and (status == 0 or not alive):
      return False
    self.seconds.append(seconds)
    self.interrupts += number == signal.SIGINT
    step = int(told[1]) if told else 0
    self.steps.append(step)
    if status == 75 and step == step_of(workdir) == max(whole(workdir)) and 'Traceback' not in said:
      self.saved += 1
    else:
      self.wrong.append(f'status {status}, told {step}, logged {step_of(workdir)}, saved {whole(workdir)}: {said[-300:]}')
    print(f'{number.name} at step {step}: {seconds:.2f} s', file=sys.stderr)
    return True

  def _check_start(self, log: Path, newest: int) -> None:
    found = resumed_from(log)
    self.resumed += bool(newest) and found == newest
    if found != newest:
      self.wrong.append(f'went on from {found}, not {newest}: {log.read_text()[-300:]}')


def _one_of_two(folder: Path) -> tuple[str, list[str]]:
  """A run of two processes of which first one and then the other gets a signal; what came of it, and what was wrong."""
  flags = recipe(folder, '--cpu_devices=1', steps=60)
  said, wrong = [], []
  for workdir, signalled in ((folder / 'two-straight', ()), (folder / 'two', (1, 0))):
    for index in signalled:
      running = start_group(workdir, flags, folder / 'two-log', 2, 'tests.acceptance.kept_state')
      until(lambda after=max(committed(workdir), default=0) + 7: step_of(workdir) > after, running[index])
      running[index].terminate()
      statuses, logged = [process.wait() for process in running.values()], step_of(workdir)
      both = all((workdir / f'saved-{logged}.{process}.npz').exists() for process in (0, 1))
      said.append(f'SIGTERM to {index}, status {", ".join(map(str, statuses))}, saved by both at step {logged}')
      if statuses != [75, 75] or max(whole(workdir)) != logged or not both:
        wrong.append(f'{said[-1]}: {both}, saved {whole(workdir)}: {log_of(folder / "two-log", index).read_text()[-300:]}')
    for index, process in start_group(workdir, flags, folder / 'two-log', 2, 'tests.acceptance.kept_state').items():
      if process.wait():
        text = log_of(folder / 'two-log', index).read_text()[-300:]
        return '; '.join(said), [*wrong, f'2 processes: status {process.returncode} at the end: {text}']
  ends = [kept(workdir, 'saved-60', 2) for workdir in (folder / 'two-straight', folder / 'two')]
  if figures(folder / 'two-straight') != figures(folder / 'two') or not same(*ends):
    wrong.append('2 processes: differs from the uninterrupted run')
  return '; '.join(said), wrong


@bar
def peers(folder: Path) -> Result:
  flags = recipe(folder, '--cpu_devices=1', '--rendezvous_timeout=60', steps=60)
  said, wrong = [], []
  for victim in (0, 2):
    running = start_group(folder / f'lost-{victim}', flags, folder / 'log', 4)
    until(lambda: step_of(folder / f'lost-{victim}') >= 15, running[0])
    running[victim].kill()
    said.append(_ends(running, victim, folder / 'log', f'process {victim} killed', rf'process {victim}\b.* is gone', wrong))
  running = start_group(folder / 'never', [flag.replace('_timeout=60', '_timeout=30') for flag in flags], folder / 'log', 4, absent=1)
  said.append(_ends(running, 1, folder / 'log', 'process 1 never there', 'missing: process 1', wrong))

  ends = [process.wait() for process in start_group(folder / 'straight', flags, folder / 'log', 4).values()]
  assert not any(ends), (folder / 'log.0').read_text()
  supervised, restarts = _supervised(folder / 'supervised', flags, folder / 'log', (2, 0))
  text = 'not all ended well' if any(supervised) else same_run(folder / 'straight', folder / 'supervised', flags, 60)
  wrong += [f'{text}: {(folder / "log.0").read_text()[-500:]}'] if text else []
  return Result('4 processes: one killed (-9) in training, or never there: the others end within 60 s, each with one line that names it; '
                'each under --max_restarts=3, a child of process 2 and later one of process 0 killed (-9): the run finishes without help, '
                'and metrics and train state are bitwise those of an uninterrupted run',
                f'{"; ".join(said)}; supervised: status {", ".join(map(str, supervised))}, {restarts} restarts of each in the '
                f'run of 60 steps, {text or "equal"}' + ''.join(f'; wrong: {one}' for one in wrong), not wrong and restarts == 2,
                'python -m gptjax.train --max_restarts=3 --coordinator=HOST:PORT --processes=4 --process=I --config=RECIPE --workdir=DIR')


def _ends(running: dict[int, subprocess.Popen], lost: int, logs: Path, case: str, line: str, wrong: list[str]) -> str:
  """Waits for the others to end; returns in words how they did."""
  begun, errors = time.monotonic(), []
  for index, process in running.items():
    process.wait()
    text = log_of(logs, index).read_text()
    if index != lost:
      errors += [found := [line for line in text.splitlines() if line.startswith('error: ')]]
      if len(found) != 1 or not re.search(line, found[0]) or 'Traceback' in text or process.returncode not in (1, 2):
        wrong.append(f'{case}: process {index}, status {process.returncode}: {text[-500:]}')
  seconds = time.monotonic() - begun
  if seconds > 60:
    wrong.append(f'{case}: {seconds:.0f} s')
  return f'{case}: the others ended after {seconds:.1f} s with {errors[-1][0] if errors[-1] else "nothing"!r}'


def _supervised(workdir: Path, flags: list[str], logs: Path, victims: tuple[int, ...]) -> tuple[list[int], int]:
  """Runs 4 supervised processes and kills children of them; returns the statuses, and the restarts that all of them made."""
  running = start_group(workdir, [*flags, '--max_restarts=3'], logs, 4)
  for number, victim in enumerate(victims):
    until(lambda: step_of(workdir) >= 15 + 20 * number, running[0])
    supervisor = running[victim].pid
    child = int(Path(f'/proc/{supervisor}/task/{supervisor}/children').read_text().split()[0])
    os.kill(child, signal.SIGKILL)
  statuses = [process.wait() for process in running.values()]
  counts = {log_of(logs, index).read_text().count('restarted in') for index in range(4)}
  return statuses, counts.pop() if len(counts) == 1 else -1


@bar
def faults_policies(folder: Path) -> Result:
  cases = json.loads(python('tests.acceptance.policies', *recipe(folder), f'--workdir={folder}/runs', '--cpu_devices=8').stdout)
  wrong = [f'{case["mesh"]}, {case["where"]}, {case["policy"]}: {", ".join(case["wrong"])}' for case in cases if case['wrong']]
  kind = lambda words: 'goes on' if words.startswith('goes on') else 'ends'
  groups = itertools.groupby(cases, lambda case: f'{case["mesh"]}, {case["where"]}')
  table = '; '.join(f'{name}: ' + ', '.join(f'{case["policy"]} {kind(case["words"])}' for case in group) for name, group in groups)
  return Result('8 devices, ZeRO 0 and 3, NaN in the batch of a step, in its gradient, or on one device: stop ends the run and '
                'reports the rows or the device, skip omits that update (a state with a wrong device ends the run), rollback returns to '
                'the last checkpoint and skips the rows; a device is found within faults.compare_every=2 steps; earlier steps, and the '
                'same command after an end, are bitwise as without the fault',
                f'{len(cases) - len(wrong)} of {len(cases)} cases: {table}' + ''.join(f'; wrong: {one}' for one in wrong),
                not wrong and len(cases) == 21, 'python -m gptjax.train --config.faults.bad_step=stop|skip|rollback ...')
