"""Bars of many processes: the same run as one process has, and an end in time where one does not come."""

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.acceptance.kept_state import kept, same
from tests.acceptance.record import Result, bar, python, several
from tests.acceptance.training import shakespeare

_STEPS = 20
_TIMEOUT = 10


@bar
def processes(folder: Path) -> Result:
  recipe = ['--config=configs/shakespeare_char_cpu.py', shakespeare(), f'--cache_dir={folder}/cache',
            '--config.batch_size=16', '--config.model.dropout=0.1', '--config.zero_stage=3', '--config.eval.every=0']
  trained = ['tests.acceptance.kept_state', *recipe, f'--stop_at={_STEPS}', '--log_every=1']
  work = {name: folder / name for name in ('one', 'four')}
  python(*trained, f'--workdir={work["one"]}', '--cpu_devices=8')
  several(4, 2, *trained, f'--workdir={work["four"]}')
  one, four = ([json.loads(line) for line in (place / 'metrics.jsonl').read_text().splitlines()] for place in work.values())
  assert len(one) == len(four) == _STEPS
  worst = max(abs(a[name] / b[name] - 1) for a, b in zip(one, four) for name in a if name.endswith('loss'))

  feed = ['tools.feed', *recipe, f'--steps={_STEPS}', f'--out={folder}/rows']
  python(*feed, '--cpu_devices=8')
  several(4, 2, *feed)
  rows = (folder / 'rows').read_text().splitlines()
  parts = [(folder / f'rows.{process}').read_text().splitlines() for process in range(4)]
  different = len({*rows} ^ {line for part in parts for line in part})
  own = [len(part) for part in parts]

  python(*trained, f'--workdir={work["four"]}')  # restores on one process with one device
  saved, restored = kept(work['four'], f'saved-{_STEPS}', 4), kept(work['four'], f'restored-{_STEPS}', 1)
  whole = len(saved) > 30 and same(saved, restored)
  return Result('4 processes x 2 CPU devices (Gloo) against 1 process x 8, ZeRO 3, dropout on: losses within 1e-5 relative, global rows '
                'identical and each made by one process alone, state restored on 1 process bit by bit what 4 saved',
                f'{len(one)} losses, worst {worst:.1e}; {len(rows)} rows, different {different}, made by each {", ".join(map(str, own))}; '
                f'{len(saved)} arrays {"equal" if whole else "different"}',
                worst <= 1e-5 and not different and own == [len(rows) // 4] * 4 and whole,
                'python -m tools.launch.local --processes=4 --devices=2 -- python -m gptjax.train --config=RECIPE --workdir=DIR')


@bar
def missing_peer(folder: Path) -> Result:
  command = [sys.executable, '-m', 'gptjax.train', '--config=configs/shakespeare_char_cpu.py', f'--workdir={folder}/run', '--cpu_devices=2',
             '--processes=4', '--coordinator=localhost:51789', f'--rendezvous_timeout={_TIMEOUT}']
  start = time.monotonic()
  running = [subprocess.Popen([*command, f'--process={index}'], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
             for index in (0, 1, 3)]
  errors = [process.communicate()[1] for process in running]
  seconds = time.monotonic() - start
  alike = all(text.startswith(f'error: peers: 3 of 4 joined within {_TIMEOUT} s, missing: process 2, ') and text.count('\n') == 1
              for text in errors)
  return Result(f'3 of 4 processes, --rendezvous_timeout={_TIMEOUT}: each ends within {_TIMEOUT} s and 3 s to start, with status 2 and '
                'one line',
                f'{seconds:.1f} s; status {", ".join(str(process.returncode) for process in running)}; {errors[0].strip()}',
                alike and seconds <= _TIMEOUT + 3 and all(process.returncode == 2 for process in running),
                f'python -m gptjax.train --processes=4 --process=0 --coordinator=HOST:PORT --rendezvous_timeout={_TIMEOUT} ...')
