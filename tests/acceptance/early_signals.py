"""Bar of signals at any moment of a program: each ends it with one line and its exit status, and leaves no incomplete file."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.acceptance.disturbed import recipe
from tests.acceptance.record import Result, bar, python
from tests.acceptance.training import shakespeare

_MOMENTS = 200
"""Number of moments per program."""
_SECONDS = 20.0
_PYTHON = 0.1
"""Seconds in which Python itself starts, before it imports anything of this project."""
_BROKEN = re.compile(r'Traceback|Exception ignored|Segmentation|Fatal|Aborted|terminate called|error:')


def disturb(command: Sequence[str], written: Path, number: int, seconds: float) -> str:
  """Starts a module, sends a signal after some time, and returns what is wrong with its end; '' for nothing.

  `written` is the file or folder that the module writes.
  """
  process = subprocess.Popen([sys.executable, '-m', *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
  try:
    printed = process.communicate(timeout=seconds)[1]
  except subprocess.TimeoutExpired:
    process.send_signal(number)
    printed = process.communicate(timeout=120)[1]
  name, status = signal.Signals(number).name, process.returncode
  lines = [line for line in printed.splitlines() if line.startswith(f'{name}: ')]
  saved = [f'{name}: saving after', f'{name}: saved step']  # training reports both
  wrong = []
  if status == 75:
    wrong += [] if [line[:len(start)] for line, start in zip(lines, saved)] == saved else ['not saved']
  elif status:
    wrong += [] if status == 128 + number and len(lines) == 1 and lines[0].startswith(f'{name}: ended') else ['no line or another status']
  wrong += [found[0]] if (found := _BROKEN.search(printed)) else []
  wrong += [f'left {path.name}' for path in _halves(written)]
  if wrong:
    return f'{command[0]}, {name} after {seconds:.2f} s: {", ".join(wrong)}; status {status}: {printed[-300:]}'
  return ''


def _halves(written: Path) -> Iterator[Path]:
  """Files that a program had not finished, except those that the next start completes or removes, such as NAME.building."""
  for path in written.parent.glob(f'{written.name}*'):
    yield from path.rglob('*.partial') if path.is_dir() and path == written else ()
    if path.name.endswith('.partial') or path.is_file() and not path.stat().st_size and path.suffix != '.lock':
      yield path


def programs(run: Path, folder: Path, train: Sequence[str]) -> Mapping[str, tuple[list[str], Path]]:
  """Name -> (module and flags of a program that runs long, what it writes), with a trained run and an empty folder."""
  out, export, text = folder / 'out', folder / 'export', '--source=gptjax/**/*.py'
  return {
    'train': (['gptjax.train', *train, f'--workdir={out}'], out),
    'evaluate': (['gptjax.evaluate', f'--workdir={run}', '--batch_size=1', '--step=all'], run / 'evaluations.jsonl'),
    'generate': (['gptjax.generate', f'--workdir={run}', '--prompt=A', '--max_tokens=3000', f'--out={out}.jsonl'],
                 out.with_suffix('.jsonl')),
    'plan': (['gptjax.plan', '--config=configs/llama_7b.py', '--topology=v5p:4x4x4', '--search', f'--json={out}.json'],
             out.with_suffix('.json')),
    'train_tokenizer': (['tools.train_tokenizer', text, '--vocab_size=4000', f'--out={out}'], out),
    'prepare_data': (['tools.prepare_data', text, '--tokenizer=bytes', '--processes=2', f'--out={out}'], out),
    'inspect_data': (['tools.inspect_data', f'--workdir={run}', f'--plot={out}.png'], out.with_suffix('.png')),
    'inspect_checkpoint': (['tools.inspect_checkpoint', f'--workdir={run}'], out),
    'export_hf': (['tools.export_hf', f'--workdir={run}', f'--folder={export}', '--check=none'], export),
    'report': (['tools.report', f'--workdir={run}', f'--out={out}.html'], out.with_suffix('.html')),
    'launch.local': (['tools.launch.local', '--processes=2', '--devices=1', '--', sys.executable, '-m', 'gptjax.train', *train,
                      f'--workdir={out}'], out),
  }


def over_its_time(command: Sequence[str], written: Path, moments: int) -> tuple[float, list[str]]:
  """Interrupts a module at `moments` moments of its first 20 seconds, or of its whole run; returns that time in seconds and the errors."""
  dice = random.Random(2)
  begun = time.monotonic()
  wrong = [disturb(command, written, signal.SIGINT, _SECONDS)]  # this also fills caches
  last = min(time.monotonic() - begun, _SECONDS)
  for moment in range(moments):
    if written.is_dir():
      shutil.rmtree(written)
    seconds = _PYTHON + (last - _PYTHON) * (moment + dice.random()) / moments
    wrong.append(disturb(command, written, (signal.SIGINT, signal.SIGTERM)[moment % 2], seconds))
  return last, [found for found in wrong if found]


@bar
def early_signals(folder: Path) -> Result:
  run, wrong, counted = folder / 'run', [], []
  # A model that can be exported.
  python('gptjax.train', '--config=configs/default.py', shakespeare(), f'--cache_dir={folder}/cache', f'--workdir={run}',
         '--config.data.tokenizer.vocab_size=384', '--config.steps=40', '--config.model.layers=2', '--config.eval.sample_tokens=0')
  python('gptjax.evaluate', f'--workdir={run}')
  for name, (command, written) in programs(run, folder, recipe(folder)).items():
    last, found = over_its_time(command, written, _MOMENTS)
    wrong += found
    counted.append(f'{name} over {last:.1f} s')
    print(f'{counted[-1]}: {len(found)} of {_MOMENTS} wrong', file=sys.stderr)
  return Result(f'SIGINT and SIGTERM, by turns, at {_MOMENTS} moments over the first {_SECONDS:.0f} s of each program that runs long: one '
                'line, status 130 or 143, or 75 in the training loop; no file half-written',
                f'{", ".join(counted)}: {len(wrong)} ended otherwise' + ''.join(f'; wrong: {one}' for one in wrong[:5]), not wrong,
                'kill -INT or -TERM of python -m gptjax.train, and of the other programs')
