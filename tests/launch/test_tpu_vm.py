"""tools/launch/tpu_vm.sh against a gcloud that knows one host: a folder, in which its commands run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'tools/launch/tpu_vm.sh'

GCLOUD = f'#!{sys.executable}' + '''
import os, pathlib, shutil, subprocess, sys
home = pathlib.Path(os.environ['HOST'])
with (home / 'calls').open('a') as calls:
  calls.write(' '.join(arg.split('\\n')[0] for arg in sys.argv[1:]) + '\\n')
if 'scp' in sys.argv:
  source, target = sys.argv[5:7]
  shutil.copy(source, home / target.partition(':')[2])
if 'ssh' in sys.argv:
  command = next(arg.removeprefix('--command=') for arg in sys.argv if arg.startswith('--command='))
  sys.exit(subprocess.run(['bash', '-c', command], cwd=home).returncode)
'''
PYTHON3 = '''#!/bin/sh
echo "python3 $*" >> "$HOST/calls"
'''


@pytest.fixture
def call(tmp_path):
  """A function that runs the script with arguments and returns (exit code, what it printed, what gcloud was asked)."""
  host, programs = tmp_path / 'host', tmp_path / 'bin'
  host.mkdir()
  programs.mkdir()
  for name, text in (('gcloud', GCLOUD), ('python3', PYTHON3)):
    (programs / name).write_text(text)
    (programs / name).chmod(0o755)
  environment = {**os.environ, 'HOST': str(host), 'PATH': f'{programs}:{os.environ["PATH"]}',
                 'ZONE': 'z', 'ACCELERATOR': 'a', 'RUNTIME': 'r'}

  def run(*arguments, **changes):
    (host / 'calls').write_text('')
    done = subprocess.run([SCRIPT, *arguments], env=environment | changes, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, (host / 'calls').read_text().splitlines()

  run.host = host
  return run


def test_a_slice_is_asked_for_and_given_back(call):
  code, _, calls = call('create', 'first', '--spot')
  assert code == 0 and calls == [
    'compute tpus queued-resources create first --node-id=first --zone=z --accelerator-type=a --runtime-version=r --spot']
  assert call('delete', 'first')[2] == ['compute tpus queued-resources delete first --zone=z --force --quiet']


@pytest.mark.skipif(not (ROOT / '.git').exists(), reason='needs a git checkout: setup copies HEAD')
def test_setup_copies_the_repository_to_every_host(call):
  code, printed, calls = call('setup', 'first')
  assert code == 0, printed
  assert calls[0].endswith('first:gptjax.tar.gz --zone=z --worker=all --batch-size=all --quiet')
  assert (call.host / 'gptjax/gptjax/train.py').exists()
  assert [line for line in calls if line.startswith('python3')] == [
    'python3 -m pip install --quiet --user uv', 'python3 -m uv venv --quiet --python=3.12',
    'python3 -m uv pip install --quiet --python=.venv/bin/python -r requirements-tpu.txt -r requirements-data.txt']


def test_a_command_runs_on_after_the_connection_and_is_ended_by_stop(call):
  (call.host / 'gptjax/.venv/bin').mkdir(parents=True)
  program = call.host / 'gptjax/.venv/bin/program'
  program.write_text('#!/bin/sh\nfor one in "$@"; do echo "<$one>"; done; sleep 300\n')
  program.chmod(0o755)
  code, printed, calls = call('run', 'first', 'program', '--prompt=two words', "it's $HOME")
  assert code == 0, printed
  assert '--worker=all' in calls[0]
  pid = int((call.host / 'gptjax/gptjax.pid').read_text())
  try:
    _until(lambda: (call.host / 'gptjax/gptjax.log').read_text() == "<--prompt=two words>\n<it's $HOME>\n")
    assert os.getpgid(pid) == pid and alive(pid)
    assert call('stop', 'first')[0] == 0
    _until(lambda: not alive(pid))
  finally:
    if alive(pid):
      os.killpg(pid, 9)


def test_mistakes_are_told(call):
  code, printed, calls = call('start', 'first')
  assert code == 2 and 'start: not one of create, setup' in printed and not calls
  code, printed, _ = call('create')
  assert code == 2 and printed.startswith('export ZONE') and printed.splitlines()[-1].startswith('tools/launch/tpu_vm.sh delete')
  code, printed, calls = call('create', 'first', ZONE='')
  assert code != 0 and 'ZONE: the zone of the slice' in printed and not calls


def alive(pid):
  """Whether the process runs; one that ended and waits for its parent does not."""
  state = Path(f'/proc/{pid}/stat')
  return state.exists() and state.read_text().rpartition(')')[2].split()[0] != 'Z'


def _until(condition, seconds=20):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)
