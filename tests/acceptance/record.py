"""Shared by all bars: registers them, runs commands of the project, and records results."""

import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags

from gptjax.config import UserError
from tools.bench.machine import machine

_DATA = flags.DEFINE_string(
  'data', '', 'folder with tinyshakespeare/input.txt, books/{train,valid}/*.txt, gsm8k/train.jsonl, sms_spam/SMSSpamCollection, '
  'addition/addition.txt, instructions/instruction-data-with-preference.json, chinchilla/svg_extracted_data.csv, gpt2_bpe/, lambada/ '
  'and piqa/')
_OUT = Path('docs/bars.md')

CLOCK = {'tokens_per_second', 'mfu', 'data_wait'}
"""Fields of metrics.jsonl that depend on the clock."""


@dataclasses.dataclass(frozen=True)
class Result:
  """What a bar measured."""

  promise: str
  figure: str
  met: bool
  command: str


BARS: dict[str, Callable[[Path], Result]] = {}


def bar(function: Callable[[Path], Result]) -> Callable[[Path], Result]:
  """Registers a bar under its function's name; it gets an empty folder of its own."""
  BARS[function.__name__] = function
  return function


def given(name: str) -> Path:
  """A file or folder of --data.

  Raises:
    UserError: it is not there.
  """
  path = Path(_DATA.value, name)
  if not _DATA.value or not path.exists():
    raise UserError('--data', _DATA.value, f'a folder that has {name}')
  return path.resolve()


def python(*args: str, **environment: str) -> subprocess.CompletedProcess:
  """Runs a module of this project to its end; its stdout is kept, its stderr goes to the terminal."""
  done = subprocess.run([sys.executable, '-m', *args], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
  if done.returncode:
    raise RuntimeError(f'{" ".join(args)} ended with status {done.returncode}')
  return done


def on_cpu() -> None:
  """Lets this process use CPUs alone; to be called before JAX starts."""
  import jax
  jax.config.update('jax_platforms', 'cpu')


def several(processes: int, devices: int, *args: str) -> subprocess.CompletedProcess:
  """Runs a module as `processes` processes of one run, each with `devices` virtual CPU devices."""
  return python('tools.launch.local', f'--processes={processes}', f'--devices={devices}', '--', sys.executable, '-m', *args)


def train(config: str, workdir: Path, *args: str) -> list[dict]:
  """Trains, and returns the lines of metrics.jsonl."""
  python('gptjax.train', f'--config=configs/{config}.py', f'--workdir={workdir}', *args)
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def evaluate(workdir: Path, *args: str) -> dict:
  """The JSON object that gptjax.evaluate ends with."""
  return json.loads(python('gptjax.evaluate', f'--workdir={workdir}', *args).stdout.splitlines()[-1])


def timed(*names: str) -> list[dict]:
  """Results of tools.bench for these contests."""
  lines = python('tools.bench', f'--only={",".join(names)}').stdout.splitlines()
  return [json.loads(line) for line in lines if line.startswith('{')]


def write(results: dict[str, Result]) -> None:
  """Puts rows into docs/bars.md, beside those of bars that did not run now."""
  rows = {}
  if _OUT.exists():
    rows = {line.split('|')[1].strip(): line for line in _OUT.read_text().splitlines() if re.match(r'\| [a-z0-9_]+ \| ', line)}
  for name, r in results.items():
    verdict = 'met' if r.met else '**not met**'
    rows[name] = f'| {name} | {r.promise} | {r.figure} | {verdict} | `{r.command}` | {datetime.date.today()}, {machine()} |'
  ordered = [rows[name] for name in BARS if name in rows]
  head = ['# Bars', '', '`make bars` measured these, each with the commands a user would type.', '',
          '| name | promise | figure | verdict | command | date and machine |', '| --- | --- | --- | --- | --- | --- |']
  _OUT.parent.mkdir(exist_ok=True)
  _OUT.write_text('\n'.join(head + ordered) + '\n')
