"""Signals, notices and the clock save after the current step and lose nothing; a hang ends with the stacks of all threads."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import pytest
from tiers import full
from tiny import config, options, records, run, write_text

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints
from gptjax.config import MeshConfig, UserError
from gptjax.distributed import watch_notices
from gptjax.sharding import make_mesh
from gptjax.training import loop, train
from gptjax.training.interruptions import REQUEUE_EXIT_CODE, Interruptions, StopRequest, _Consensus
from gptjax.training.logbook import Logbook
from gptjax.training.workdir import lock

TESTS = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def settings(cache):
  return config(write_text(cache / 'text.txt'), steps=8, eval__every=0, model__dropout=0.1)


@pytest.mark.parametrize('number', [signal.SIGTERM, full(signal.SIGINT)])
def test_a_signal_saves_the_step_and_the_same_command_resumes(number, settings, cache, tmp_path, monkeypatch, capsys):
  straight = run(settings, tmp_path / 'straight', cache)
  advance = Logbook.advance

  def signalled(self, step):
    advance(self, step)
    if step == 4:
      os.kill(os.getpid(), number)

  before = signal.getsignal(number)
  monkeypatch.setattr(Logbook, 'advance', signalled)
  assert train(settings, options(tmp_path / 'run', cache)) == REQUEUE_EXIT_CODE == 75
  assert signal.getsignal(number) == before
  assert f'{number.name}: saved step 5 of 8' in capsys.readouterr().err
  assert Checkpoints(tmp_path / 'run' / 'checkpoints').newest() == 5
  assert records(tmp_path / 'run') == [line for line in straight if line['step'] <= 5]
  monkeypatch.setattr(Logbook, 'advance', advance)
  assert train(settings, options(tmp_path / 'run', cache)) == 0
  assert records(tmp_path / 'run') == straight


def test_a_signal_works_after_stderr_is_closed(monkeypatch):
  # Ctrl-C ends the tee behind a run as well.
  def broken(descriptor, data):
    raise BrokenPipeError

  monkeypatch.setattr(os, 'write', broken)
  with Interruptions(make_mesh(MeshConfig(1, 1))) as interruptions:
    os.kill(os.getpid(), signal.SIGINT)
    assert interruptions.poll() == StopRequest.STOP and interruptions.reason == 'SIGINT'


STUCK = """
import sys, time, types, conftest
conftest._set_up_jax()
from tiny import config, options
from gptjax.training import interruptions, loop, train
after = loop._Loop._after_step
# The watchdog's clock stands still until the hang: the step may compile for any time, as it does on a busy machine.
clock = types.SimpleNamespace(now=0.0)
interruptions.time = types.SimpleNamespace(monotonic=lambda: clock.now)

def stuck(self, last):
  if self.steps.step == 3:
    print('stuck', flush=True)
    clock.now += 1000
    while True:
      time.sleep(0.05)
  return after(self, last)

loop._Loop._after_step = stuck
train(config(sys.argv[1], eval__every=0), options(sys.argv[2], sys.argv[3], hang_timeout=float(sys.argv[4])))
"""


def stuck(settings, workdir, cache, seconds):
  return subprocess.Popen([sys.executable, '-c', STUCK, settings.data.source.path, workdir, cache, str(seconds)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=os.environ | {'PYTHONPATH': f'{TESTS}:{TESTS.parent}'})


@pytest.mark.full
def test_a_hang_ends_with_every_stack_and_a_second_signal_at_once(settings, cache, tmp_path):
  process, other = stuck(settings, tmp_path / 'run', cache, 4), stuck(settings, tmp_path / 'other', cache, 0)
  assert other.stdout.readline() == 'stuck\n'
  for _ in range(2):  # the first reaches a loop that does not finish its step
    other.send_signal(signal.SIGTERM)
    time.sleep(0.5)
  printed = other.communicate(timeout=60)[1]
  assert other.returncode == -signal.SIGTERM and 'a second signal ends at once' in printed
  printed = process.communicate(timeout=300)[1]
  assert process.returncode == 1
  assert 'error: hang: no step, batch or save was completed in 4 s' in printed and 'in stuck' in printed
  assert 'in stuck' in (tmp_path / 'run' / 'stacks-0.txt').read_text()


def test_the_clock_requests_saves(settings, cache, tmp_path, monkeypatch):
  checkpoints = configs.override(settings, {'checkpoint.minutes': 1e-9, 'checkpoint.keep': 100})
  run(checkpoints, tmp_path, cache, stop_at=3)
  assert Checkpoints(tmp_path / 'checkpoints').steps() == [1, 2, 3]


def test_processes_agree_on_requests_one_step_later():
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    agree = _Consensus(mesh)
    assert [agree(request) for request in (StopRequest.NONE, StopRequest.SAVE, StopRequest.STOP, StopRequest.NONE, StopRequest.NONE)] == [
      StopRequest.NONE, StopRequest.NONE, StopRequest.SAVE, StopRequest.STOP, StopRequest.NONE]
    agree(StopRequest.SAVE)
    agree.reset()  # all saved: no request is fulfilled twice
    assert agree(StopRequest.NONE) == StopRequest.NONE


def test_a_save_that_all_agreed_on_happens_once():
  mesh = make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    interruptions = Interruptions(mesh)
    interruptions._consensus = _Consensus(mesh)  # as where several processes are
    interruptions.save_in(0.0)
    assert [interruptions.poll(), interruptions.poll()] == [StopRequest.NONE, StopRequest.SAVE]
    interruptions.saved()
    assert [interruptions.poll(), interruptions.poll()] == [StopRequest.NONE, StopRequest.NONE]


def test_a_failed_save_is_requested_again_after_some_time():
  interruptions = Interruptions(make_mesh(MeshConfig(1, 1)))
  assert interruptions.poll() == StopRequest.NONE
  interruptions.save_in(0.05)
  assert interruptions.poll() == StopRequest.NONE
  time.sleep(0.06)
  assert interruptions.poll() == StopRequest.SAVE
  interruptions.saved()
  assert interruptions.poll() == StopRequest.NONE


@pytest.fixture
def cloud(monkeypatch):
  """A metadata server: answers by path and method, each a list that is served in order, the last one again and again. A proxy of the
  environment does not reach it."""
  monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
  answers, asked = {}, []

  class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append((self.command, self.path, dict(self.headers)))
      queue = answers.get((self.command, self.path.partition('?')[0]), [(404, '')])
      status, text = queue.pop(0) if len(queue) > 1 else queue[0]
      self.send_response(status)
      self.send_header('ETag', 'seen')
      self.end_headers()
      self.wfile.write(text.encode())

    do_PUT = do_GET

    def log_message(self, *args):
      pass

  with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'127.0.0.1:{server.server_port}', answers, asked
    server.shutdown()


@pytest.mark.parametrize('last, printed', [
  ({'preempted': 'TRUE'}, 'preempts the machine'), ({'maintenanceEvent': 'TERMINATE_ON_HOST_MAINTENANCE'}, 'for maintenance')])
def test_google_announces_the_end_of_a_machine(last, printed, cloud):
  host, answers, asked = cloud
  answers['GET', '/computeMetadata/v1/instance/'] = [
    (200, json.dumps(one)) for one in ({'preempted': 'FALSE', 'maintenanceEvent': 'NONE'}, {'preempted': 'FALSE'}, last)]
  noticed, notices = threading.Event(), []
  assert watch_notices(lambda text: (notices.append(text), noticed.set()), {'GCE_METADATA_HOST': host})
  assert noticed.wait(10) and printed in notices[0]
  assert all(headers['Metadata-Flavor'] == 'Google' and 'wait_for_change=true' in path for _, path, headers in asked)
  assert 'last_etag=0' in asked[0][1] and 'last_etag=seen' in asked[1][1]


def test_ec2_announces_the_end_of_a_machine(cloud, monkeypatch):
  from gptjax.distributed import cloud as clouds
  monkeypatch.setattr(clouds, '_INTERVAL', 0.01)
  host, answers, asked = cloud
  answers['PUT', '/latest/api/token'] = [(200, 'secret')]
  answers['GET', '/latest/meta-data/spot/instance-action'] = [
    (404, ''), (500, ''), (200, 'no JSON'), (200, json.dumps({'action': 'terminate', 'time': '2030-01-01T00:00:00Z'}))]
  noticed, notices = threading.Event(), []
  assert watch_notices(lambda text: (notices.append(text), noticed.set()), {'AWS_EC2_METADATA_SERVICE_ENDPOINT': f'http://{host}/'})
  assert noticed.wait(10) and notices == ['EC2 will terminate the machine at 2030-01-01T00:00:00Z']
  assert {headers.get('X-Aws-Ec2-Metadata-Token') for method, _, headers in asked if method == 'GET'} == {'secret'}


def test_a_notice_ends_a_run_as_a_signal_does(settings, cache, tmp_path, cloud, monkeypatch, capsys):
  host, answers, _ = cloud
  answers['GET', '/computeMetadata/v1/instance/'] = [(200, '{"preempted": "TRUE"}')]
  monkeypatch.setenv('GCE_METADATA_HOST', host)
  slower = loop._Loop._after_step
  monkeypatch.setattr(loop._Loop, '_after_step', lambda self, last: (time.sleep(0.2), slower(self, last))[1])
  assert train(settings, options(tmp_path, cache)) == REQUEUE_EXIT_CODE
  assert 'Google Cloud preempts the machine: saved step' in capsys.readouterr().err


def test_a_machine_without_a_cloud_sends_no_requests():
  assert not watch_notices(lambda text: None, {})


def test_two_runs_do_not_share_a_workdir(settings, cache, tmp_path):
  run(settings, tmp_path / 'run', cache, stop_at=2)
  with lock(tmp_path / 'run'), pytest.raises(UserError, match=rf'no other run uses; this one is locked by process {os.getpid()} on '):
    train(settings, options(tmp_path / 'run', cache))
  assert records(tmp_path / 'run')[-1]['step'] == 2
  assert run(settings, tmp_path / 'run', cache)[-1]['step'] == 8  # the lock file of a dead process does not matter
