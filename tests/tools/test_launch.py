"""The local launcher starts processes that know their place, and leaves none behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def launch(*flags, body='', launcher=('-m', 'tools.launch.local'), **more):
  return subprocess.Popen([sys.executable, *launcher, *flags, '--', sys.executable, '-c', body], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def finish(process):
  out, errors = process.communicate(timeout=60)
  return process.returncode, out, errors


def test_each_process_knows_its_place_and_its_devices():
  status, out, errors = finish(launch('--processes=3', '--devices=2', body='import sys; print(*sys.argv[1:])'))
  lines = [out, *sorted(errors.splitlines())]
  assert status == 0 and len(lines) == 3
  coordinator = out.split()[0]
  assert coordinator.startswith('--coordinator=localhost:')
  for index, line in enumerate(lines):
    expected = f'{coordinator} --processes=3 --process={index} --cpu_devices=2'
    assert line.strip() == (expected if index == 0 else f'[{index}] {expected}')


def test_gpus_are_shared_out():
  body = 'import os; print(os.environ["CUDA_VISIBLE_DEVICES"])'
  done = finish(launch('--processes=2', body=body, env=os.environ | {'CUDA_VISIBLE_DEVICES': '0,1,4,5'}))
  assert done == (0, '0,1\n', '[1] 4,5\n')
  status, _, errors = finish(launch('--processes=2', body=body, env=os.environ | {'CUDA_VISIBLE_DEVICES': '0,1,4'}))
  assert status == 2 and errors.startswith('error: --processes: 2, expected: a divisor of the 3 GPUs here')


STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
index = int(sys.argv[3].partition('=')[2])
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])
signal.signal(signal.SIGTERM, signal.SIG_IGN if index == 2 and {fails} else signal.SIG_DFL)
pathlib.Path({folder!r}, str(index)).write_text(f'{{os.getpid()}} {{child.pid}}')
while len(list(pathlib.Path({folder!r}).iterdir())) < 3:
  time.sleep(0.01)
if index == 1 and {fails}:
  child.kill()
  sys.exit(7)
time.sleep(100)
"""


def alive(folder):
  found = []
  for pid in ' '.join(file.read_text() for file in folder.iterdir()).split():
    stat = pathlib.Path('/proc', pid, 'stat')
    if stat.exists() and stat.read_text().rpartition(')')[2].split()[0] != 'Z':
      found.append(pid)
  return found


def test_when_one_fails_all_end_with_its_status(tmp_path):
  impatient = ('import sys; from tools.launch import local; local._GRACE = local._TERMINATED = 0.5; '
               'sys.exit(local.launch(sys.argv[2:], 3, 1))')
  status, _, _ = finish(launch(body=STUBBORN.format(folder=str(tmp_path), fails=True), launcher=('-c', impatient)))
  assert status == 7 and not alive(tmp_path)


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_end_from_outside_ends_all(number, status, tmp_path):
  process = launch('--processes=3', '--devices=1', body=STUBBORN.format(folder=str(tmp_path), fails=False))
  while len([file for file in tmp_path.iterdir() if file.read_text()]) < 3:
    time.sleep(0.05)
  process.send_signal(number)
  assert finish(process)[0] == status and not alive(tmp_path)


def test_a_signal_while_processes_are_started_reaches_all(tmp_path):
  launcher = ('import os, signal, subprocess, sys; from tools.launch import local; start, numbers = subprocess.Popen, [signal.SIGTERM]\n'
              'def signalled(*args, **options):\n'
              '  if numbers: os.kill(os.getpid(), numbers.pop())\n'
              '  return start(*args, **options)\n'
              'subprocess.Popen = signalled; sys.exit(local.launch(sys.argv[2:], 2, 1))')
  status, out, _ = finish(launch(body='import time; time.sleep(30); print("late")', launcher=('-c', launcher)))
  assert (status, out) == (143, '')


def test_no_command_is_one_line():
  done = subprocess.run([sys.executable, '-m', 'tools.launch.local', '--devices=1'], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.startswith('error: command: None, expected: a command after --')
