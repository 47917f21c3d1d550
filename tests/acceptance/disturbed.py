"""Shared by the bars of faults: starts a small run to interrupt it, reads what it left on disk, and compares it with another run."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax.checkpoint.manifest import verify
from tests.acceptance.kept_state import kept, same
from tests.acceptance.record import CLOCK, python
from tests.acceptance.training import shakespeare

STEPS = 300
KEEP = 2


def recipe(folder: Path, *flags: str, steps: int = STEPS) -> list[str]:
  """Flags of nanoGPT's CPU recipe for some steps with a save every 10, validations and dropout, all steps logged."""
  return ['--config=configs/shakespeare_char_cpu.py', shakespeare(), f'--cache_dir={folder}/cache', f'--config.steps={steps}',
          '--config.optimizer.warmup=20', '--config.checkpoint.every=10', f'--config.checkpoint.keep={KEEP}', '--config.eval.every=60',
          '--config.eval.rows=24', '--config.eval.sample_tokens=0', '--config.model.dropout=0.1', '--log_every=1', *flags]


def start(workdir: Path, flags: Sequence[str], log: Path, module: str = 'gptjax.train') -> subprocess.Popen:
  """Starts a module in a workdir; `log` gets its stderr."""
  with log.open('w') as file:
    return subprocess.Popen([sys.executable, '-m', module, *flags, f'--workdir={workdir}'], stdout=subprocess.DEVNULL, stderr=file)


def start_group(workdir: Path, flags: Sequence[str], logs: Path, processes: int, module: str = 'gptjax.train',
                absent: int | None = None) -> dict[int, subprocess.Popen]:
  """Starts the processes of one run, but for an absent one, with explicit flags; `logs`.I gets the stderr of process I."""
  with socket.socket() as found:
    found.bind(('localhost', 0))
    port = found.getsockname()[1]
  return {process: start(workdir, [*flags, f'--coordinator=localhost:{port}', f'--processes={processes}', f'--process={process}'],
                         log_of(logs, process), module) for process in range(processes) if process != absent}


def log_of(logs: Path, process: int) -> Path:
  """The file with the stderr of a process of a group."""
  return logs.with_name(f'{logs.name}.{process}')


def until(true: Callable[[], object], process: subprocess.Popen, seconds: float = 300) -> bool:
  """Waits until something is true, or the process ended; returns whether it is true."""
  deadline = time.monotonic() + seconds
  while not (found := true()) and process.poll() is None:
    if time.monotonic() > deadline:
      raise RuntimeError(f'{process.args}: no progress in {seconds:.0f} s')
    time.sleep(0.001)
  return bool(found)


def step_of(workdir: Path) -> int:
  """The step of the last whole line of metrics.jsonl; 0: none."""
  try:
    with (workdir / 'metrics.jsonl').open('rb') as file:
      file.seek(max(file.seek(0, os.SEEK_END) - 2000, 0))
      lines = file.read().split(b'\n')
  except FileNotFoundError:
    return 0
  return json.loads(lines[-2])['step'] if len(lines) > 2 else 0


def step_told(log: Path) -> int:
  """The last step in the log of a start, 0 if there is none. metrics.jsonl may end with an older step."""
  return max(map(int, re.findall(r'^step (\d+)/', log.read_text(), re.MULTILINE)), default=0)


def committed(workdir: Path) -> list[int]:
  """Steps that have a checkpoint with its manifest."""
  return sorted(int(path.parent.name) for path in (workdir / 'checkpoints').glob('*/manifest.json') if path.parent.name.isdecimal())


def whole(workdir: Path) -> list[int]:
  """Steps whose checkpoint is intact, by the checksum of every file."""
  return [step for step in committed(workdir) if not verify(workdir / 'checkpoints' / str(step))]


def lost(workdir: Path, seen: list[int]) -> list[int]:
  """Checkpoints seen before that are now missing or corrupted, except those that newer ones replaced."""
  now = whole(workdir)
  return [step for step in seen if step not in now and sum(newer > step for newer in now) < KEEP]


def resumed_from(log: Path) -> int | None:
  """The step from which a start resumed according to its log, 0 for a fresh state; None if the log does not say."""
  match = re.search(r'initial state  (?:checkpoint of step (\d+),|fresh)', log.read_text())
  return match and int(match[1] or 0)


def figures(workdir: Path, name: str = 'metrics.jsonl') -> list[dict]:
  """The lines of a run without what depends on the clock."""
  return [{name: value for name, value in json.loads(line).items() if name not in CLOCK}
          for line in (workdir / name).read_text().splitlines()]


def same_run(one: Path, other: Path, flags: Sequence[str], steps: int = STEPS) -> str:
  """Restores the last checkpoint of two finished runs; returns how metrics or train states differ, '' where they do not."""
  if figures(one) != figures(other):
    return 'metrics differ'
  for workdir in (one, other):
    if not (workdir / f'restored-{steps}.0.npz').exists():
      python('tests.acceptance.kept_state', *flags, f'--workdir={workdir}')
  states = [kept(workdir, f'restored-{steps}', 1) for workdir in (one, other)]
  return '' if len(states[0]) > 30 and same(*states) else 'train states differ'
