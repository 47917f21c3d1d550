"""Implementations of one piece of work, each in a process of its own that waits while another is timed.

Rounds alternate, so a noisy machine slows all of them, and what is told is the median over rounds of the ratio to the faster rival.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

OURS = 'gptjax'


@dataclasses.dataclass(frozen=True)
class Contest:
  """Work that several implementations do."""

  work: str
  """what it is, for the table"""
  implementations: Mapping[str, Callable[[], Callable[[], Any]]]
  """by name, ours among them: each sets up, and returns what does a round of the work"""
  units: int
  """steps or tokens a round"""
  bar: float
  """a rival's time over ours that the project promises"""


def serve(contest: Contest, implementation: str) -> None:
  """A worker: warms up, then times a round for every line on stdin, and answers with JSON."""
  run = contest.implementations[implementation]()
  for _ in range(3):
    run()
  print(json.dumps({'ready': True}), flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    run()
    print(json.dumps({'seconds': (time.perf_counter() - start) / contest.units}), flush=True)


@contextlib.contextmanager
def _worker(name: str, implementation: str) -> Iterator[Callable[[], float]]:
  """A warm worker process; calling it times a round, in seconds a unit."""
  command = [sys.executable, '-m', 'tools.bench', f'--worker={implementation}', f'--only={name}']
  # Idle torch threads spin by default and would slow down whoever is being timed.
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'OMP_WAIT_POLICY': 'PASSIVE', 'KMP_BLOCKTIME': '0'}
  process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                             env=environment)

  def answer() -> dict:
    while line := process.stdout.readline():
      if line.startswith('{'):
        return json.loads(line)
    raise RuntimeError(f'{implementation} ended with status {process.wait()} on {name}')

  def round_() -> float:
    process.stdin.write('go\n')
    process.stdin.flush()
    return answer()['seconds']

  try:
    answer()
    yield round_
  finally:
    process.stdin.close()
    process.wait()


def compare(name: str, contest: Contest, rounds: int) -> dict:
  """Seconds a unit by implementation, and the ratio of the faster rival's to ours."""
  with contextlib.ExitStack() as stack:
    rounds_of = {one: stack.enter_context(_worker(name, one)) for one in contest.implementations}
    times: dict[str, list[float]] = {one: [] for one in contest.implementations}
    for _ in range(rounds):
      for one, timed in rounds_of.items():
        times[one].append(timed())
  medians = {one: statistics.median(seconds) for one, seconds in times.items()}
  fastest = min((one for one in medians if one != OURS), key=medians.__getitem__)
  ratios = [theirs / ours for theirs, ours in zip(times[fastest], times[OURS])]
  return {'name': name, 'seconds': medians, 'fastest rival': fastest, 'ratio': statistics.median(ratios),
          'lowest': min(ratios), 'highest': max(ratios), 'bar': contest.bar}
