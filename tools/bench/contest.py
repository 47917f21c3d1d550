"""Implementations of one piece of work, each in a process of its own that waits while another one is measured.

Rounds alternate, so that a noisy machine slows all of them, and a bar is about CPU-seconds (user + system of all threads), which other
work on the machine changes least. The ratio is the median over rounds of the faster rival's CPU-seconds to ours.
"""

import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

OURS = 'gptjax'
WARMUP = 5
"""rounds that are not measured; memory that the heap will keep is touched in them"""


@dataclasses.dataclass(frozen=True)
class Contest:
  """Work that several implementations do."""

  work: str
  """its description in the table"""
  implementations: Mapping[str, Callable[[], Callable[[], Any]]]
  """by name, ours among them: each sets up, and returns a function that does a round of the work"""
  units: int
  """steps or tokens per round"""
  bar: float
  """least ratio of a rival's CPU-seconds to ours"""
  most_faults: float
  """page faults per unit that ours must stay below"""


class Cost(NamedTuple):
  """The cost of one step or token."""

  cpu: float
  """seconds, user + system"""
  wall: float
  """seconds"""
  faults: float
  """page faults, all but those that read a disk"""


def _now() -> Cost:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return Cost(used.ru_utime + used.ru_stime, time.perf_counter(), used.ru_minflt)


def serve(contest: Contest, implementation: str) -> None:
  """A worker: warms up, then measures a round for every line on stdin, and answers with JSON."""
  run = contest.implementations[implementation]()
  for _ in range(WARMUP):
    run()
  print(json.dumps('ready'), flush=True)
  for _ in sys.stdin:
    before = _now()
    run()
    print(json.dumps([(b - a) / contest.units for a, b in zip(before, _now())]), flush=True)


@contextlib.contextmanager
def _worker(name: str, implementation: str) -> Iterator[Callable[[], Cost]]:
  """A warm worker process; calling it measures a round."""
  command = [sys.executable, '-m', __package__, f'--worker={implementation}', f'--only={name}']
  # Idle torch threads spin by default and would slow down whoever is being timed.
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'OMP_WAIT_POLICY': 'PASSIVE', 'KMP_BLOCKTIME': '0'}
  process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                             env=environment)

  def answer() -> Any:
    while line := process.stdout.readline():
      if line.startswith(('[', '"')):
        return json.loads(line)
    raise RuntimeError(f'{implementation} ended with status {process.wait()} on {name}')

  def round_() -> Cost:
    process.stdin.write('run\n')
    process.stdin.flush()
    return Cost(*answer())

  try:
    answer()
    yield round_
  finally:
    process.stdin.close()
    process.wait()


def compare(name: str, contest: Contest, rounds: int) -> dict:
  """Median costs by implementation, the ratio of the faster rival's CPU-seconds to ours, and whether the bar is met."""
  with contextlib.ExitStack() as stack:
    workers = {one: stack.enter_context(_worker(name, one)) for one in contest.implementations}
    costs: dict[str, list[Cost]] = {one: [] for one in contest.implementations}
    for _ in range(rounds):
      for one, measured in workers.items():
        costs[one].append(measured())
  medians = {one: Cost(*map(statistics.median, zip(*found))) for one, found in costs.items()}
  fastest = min((one for one in medians if one != OURS), key=lambda one: medians[one].cpu)
  ratios = [theirs.cpu / ours.cpu for theirs, ours in zip(costs[fastest], costs[OURS])]
  ratio, faults = statistics.median(ratios), max(cost.faults for cost in costs[OURS])
  return {'name': name, 'costs': {one: cost._asdict() for one, cost in medians.items()}, 'fastest rival': fastest, 'ratio': ratio,
          'lowest': min(ratios), 'highest': max(ratios), 'bar': contest.bar, 'faults': faults,
          'met': ratio >= contest.bar and faults < contest.most_faults}
