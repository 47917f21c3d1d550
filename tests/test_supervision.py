"""A run that crashes is restarted as long as it makes progress."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

from gptjax import supervision
from gptjax.supervision import supervise

RUN = """
import os, pathlib, signal, sys, time
folder, ends = pathlib.Path(sys.argv[1]), sys.argv[2].split(',')
turn = len(list(folder.glob('turn*')))
(folder / f'turn{turn}').touch()
end = ends[min(turn, len(ends) - 1)]
if 'saves' in end:
  (folder / 'checkpoints' / str(turn + 1)).mkdir(parents=True)
if 'waits' in end:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
  (folder / 'waiting').touch()
  time.sleep(60)
if 'killed' in end:
  os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(end[-1]))
"""


@pytest.fixture
def supervised(tmp_path, monkeypatch, capfd):
  """A function (ends of each turn, restarts): the exit status, how often it was started, the pauses, the printed lines."""
  pauses = []
  monkeypatch.setattr(supervision._Signals, 'wait', lambda self, seconds: pauses.append(seconds))

  def run(ends, restarts):
    status = supervise([sys.executable, '-c', RUN, str(tmp_path), ends], tmp_path, restarts, (0, 2, 75))
    return status, len(list(tmp_path.glob('turn*'))), pauses, capfd.readouterr().err
  return run


def test_a_run_is_restarted_until_it_is_done(supervised):
  status, turns, pauses, printed = supervised('saves 1,saves killed,1,0', 9)
  assert (status, turns, pauses) == (0, 4, [1, 1, 4])
  assert 'ended with status 1 after checkpoint 1: restarted in 1 s, restart 1 of 9' in printed and 'SIGKILL after checkpoint 2' in printed


@pytest.mark.parametrize('ends, status', [('0', 0), ('2', 2)])
def test_a_run_that_ended_normally_is_not_restarted(ends, status, supervised):
  assert supervised(ends, 5)[:2] == (status, 1)


def test_a_run_without_progress_is_not_restarted(supervised):
  status, turns, pauses, printed = supervised('saves 1,1', 50)
  assert (status, turns, pauses) == (1, 5, [1, 4, 15, 60]) and '5 times in a row: not restarted' in printed


def test_restarts_are_limited(supervised):
  status, turns, _, printed = supervised('saves 1', 2)
  assert (status, turns) == (1, 3) and 'after 2 restarts' in printed


SUPERVISOR = '''
import pathlib, sys
from gptjax import supervision
supervision._PAUSES = (60,) * 4
sys.exit(supervision.supervise([sys.executable, '-c', *sys.argv[1:]], pathlib.Path(sys.argv[2]), 5, (0, 2, 75)))
'''


@pytest.mark.parametrize('ends, printed', [('waits', ''), ('1', 'restarted in 60 s')])
def test_a_signal_is_forwarded_to_the_run_or_ends_the_pause(ends, printed, tmp_path):
  process = subprocess.Popen([sys.executable, '-c', SUPERVISOR, RUN, tmp_path, ends], cwd=pathlib.Path(__file__).parents[1],
                             stderr=subprocess.PIPE, text=True)
  if printed:
    assert printed in process.stderr.readline()
  deadline = time.monotonic() + 20
  while not printed and not (tmp_path / 'waiting').exists() and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  assert process.wait(20) == 75 and len(list(tmp_path.glob('turn*'))) == 1
