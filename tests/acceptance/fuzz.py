"""The bar of what people get wrong and disks lose: mutated configs and damaged files, by hypothesis, in one process.

  python -m tests.acceptance.fuzz --folder=EMPTY_FOLDER --configs=500 --damages=200

prints a JSON object. What the bar runs is a process of its own, with a bound on its memory: an end that Python cannot catch is told.
"""

import dataclasses
import faulthandler
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import config as configs
from tests.acceptance.record import Result, bar

_SECONDS = 60
"""That a command may take; all have tiny models."""
_MEMORY = 12 * 2**30
"""Bytes that the process may have."""


@dataclasses.dataclass
class Found:
  """What a number of cases came to."""

  cases: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)
  """the cases that broke the promise, each with what it did"""
  least: str = ''
  """the smallest such case"""


def search(strategy: Any, wrong: Callable[[Any], str], count: int) -> Found:
  """Tries cases, the same ones every time, and where some are wrong looks for the smallest one.

  Args:
    strategy: hypothesis's, of a case.
    wrong: what is wrong with a case; '': nothing.
    count: of cases.
  """
  from hypothesis import HealthCheck, Phase, errors, given, seed, settings
  found = Found()
  last = time.monotonic()

  def tried(phases, count, judge):
    fixed = settings(max_examples=count, phases=phases, database=None, deadline=None, report_multiple_bugs=False,
                     suppress_health_check=list(HealthCheck), print_blob=False)
    return fixed(seed(0)(given(strategy)(judge)))

  def count_one(case):
    nonlocal last
    found.cases += 1
    if text := wrong(case):
      found.wrong.append(f'{case}: {text}')
      print(f'wrong: {case}\n{text}', file=sys.stderr, flush=True)
    elif time.monotonic() - last > 30:
      print(f'{found.cases} of {count}', file=sys.stderr, flush=True)
      last = time.monotonic()

  def shrink_one(case):
    if text := wrong(case):
      found.least = f'{case}: {text}'
      raise AssertionError(text)

  tried([Phase.generate], count, count_one)()
  if found.wrong:
    try:
      tried([Phase.generate, Phase.shrink], count, shrink_one)()
    except (AssertionError, errors.Flaky):  # found.least has it
      pass
  return found


@bar
def fuzz(folder: Path) -> Result:
  """Runs this module and reads what it printed."""
  command = [sys.executable, '-m', 'tests.acceptance.fuzz', f'--folder={folder}', '--configs=500', '--damages=200']
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  promise = ('500 mutated configs (command line, recipe, config.json), 200 damaged files (tokenizer, stores, checkpoint metadata, '
             'records): status 0, or status 2 and one error line; no traceback, no hang, and the run restores bit by bit')
  if done.returncode:
    return Result(promise, f'the process ended with status {done.returncode}', False, 'python -m tests.acceptance --only=fuzz')
  told = json.loads(done.stdout.splitlines()[-1])
  wrong = told['configs']['wrong'] + told['damages']['wrong']
  figure = (f'{told["configs"]["cases"]} configs ({told["ran"]} good ones ran or were resolved), {told["damages"]["cases"]} damages '
            f'({told["refused"]} told), {told["seconds"]:.0f} s; wrong: {len(wrong) or "none"}')
  figure += ''.join(f'; {one.partition(": ")[0]}' for one in wrong[:10])
  return Result(promise, figure.replace('|', '/'), not wrong and (told['configs']['cases'], told['damages']['cases']) >= (500, 200),
                'python -m tests.acceptance --only=fuzz')


def main(_) -> None:
  import jax

  from tests.acceptance.damaged import Damages
  from tests.acceptance.mutated import Configs, mutated
  resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
  jax.config.update('jax_num_cpu_devices', 2)
  jax.config.update('jax_disable_most_optimizations', True)  # most of the time is compiling
  started = time.monotonic()
  home = Path(flags.FLAGS.folder).absolute()
  told: dict[str, Any] = {}
  real = os.fdopen(os.dup(2), 'w')
  for name, make, count in (('configs', Configs, flags.FLAGS.configs), ('damages', Damages, flags.FLAGS.damages)):
    folder = home / name
    folder.mkdir(parents=True)
    os.chdir(folder)
    cases = make(folder, home / 'cache', _SECONDS)

    def guarded(case):
      # Where even Python's signals do not get through, the process ends, and the bar says so.
      faulthandler.dump_traceback_later(4 * _SECONDS, exit=True, file=real)
      try:
        return cases.wrong(case)
      finally:
        faulthandler.cancel_dump_traceback_later()

    told[name] = dataclasses.asdict(search(mutated() if name == 'configs' else cases.strategy(), guarded, count))
    told |= {'ran': cases.ran} if name == 'configs' else {'refused': cases.refused}
    jax.clear_caches()
  print(json.dumps(told | {'seconds': time.monotonic() - started}))


if __name__ == '__main__':
  flags.DEFINE_string('folder', None, 'to work in', required=True)
  flags.DEFINE_integer('configs', 500, 'mutated configs')
  flags.DEFINE_integer('damages', 200, 'damaged files')
  configs.run(main, needs_config=False)
