"""Processes that have met wait for each other and end together, each with one line and a status; none hangs."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]

MAIN = """
import os, pathlib, sys, time
from gptjax import config, distributed

def main(_):
  folder, index, count, port = pathlib.Path(sys.argv[0]), *map(int, os.environ['PLACE'].split())
  config.exit_stack.enter_context(distributed.join(distributed.GroupSpec(count, index, f'localhost:{port}'), {}, 20.0))
  group, first, broadcast = distributed.process_group(), distributed.is_primary(), distributed.broadcast
  exec(os.environ['BODY'])

config.run(main, needs_config=False)
"""


@pytest.fixture
def run():
  """A function that runs a body in several processes; returns the status, stdout and stderr of each, and the seconds it took."""
  def start(body, count=3):
    with socket.socket() as found:
      found.bind(('localhost', 0))
      port = found.getsockname()[1]
    before = time.monotonic()
    running = [subprocess.Popen([sys.executable, '-c', MAIN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                                env=os.environ | {'BODY': body, 'PLACE': f'{index} {count} {port}'}) for index in range(count)]
    try:
      outputs = [process.communicate(timeout=60) for process in running]
    finally:
      for process in running:
        process.kill()
    return [(process.returncode, *output) for process, output in zip(running, outputs)], time.monotonic() - before
  return start


def test_process_0_broadcasts_its_value_and_all_wait_for_it(run):
  done, seconds = run('if first: time.sleep(1)\n'
                      'print(broadcast("a", index + 5), broadcast("b", [index]), group.description.split(", ")[0])\n'
                      'if first: time.sleep(1)')
  assert done == [(0, '5 [0] 3\n', '')] * 3 and seconds > 2


def test_no_process_ends_before_all_are_done(run):
  # JAX ends a process that waits for others at exit for longer than it likes.
  done, _ = run('import atexit\natexit.register(lambda: print(time.time()))\nif first: time.sleep(1.5)')
  ends = [float(out) for _, out, _ in done]
  assert max(ends) - min(ends) < 1


@pytest.mark.parametrize('culprit', [0, 1])
def test_an_error_in_one_process_ends_all_with_one_line_each(culprit, run):
  done, seconds = run(f'if index == {culprit}: raise config.UserError("data", "x", "y")\nbroadcast("never")')
  line = f"error: process {culprit}: data: 'x', expected: y\n"
  assert done == [(2, '', "error: data: 'x', expected: y\n" if index == culprit else line) for index in range(3)] and seconds < 10


def test_the_same_error_in_all_is_reported_by_each_as_its_own(run):
  done, _ = run('time.sleep(index / 10)\nraise config.UserError("data", "x", "y")')
  assert done == [(2, '', "error: data: 'x', expected: y\n")] * 3


def test_a_signal_to_one_process_ends_all_with_its_status(run):
  done, seconds = run('from gptjax import signals\nif index == 1: signals.end(15)\nbroadcast("never")')
  lines = ['error: process 1: SIGTERM: ended\n', 'SIGTERM: ended\n', 'error: process 1: SIGTERM: ended\n']
  assert done == [(143, '', line) for line in lines] and seconds < 10


@pytest.mark.parametrize('culprit', [0, 2])
def test_a_killed_process_ends_the_others(culprit, run):
  done, seconds = run(f'import signal\nif index == {culprit}: os.kill(os.getpid(), signal.SIGKILL)\nbroadcast("never")')
  assert seconds < 10
  for index, (status, out, errors) in enumerate(done):
    if index != culprit:
      assert status == 1 and out == '' and errors.startswith(f'error: process {culprit} on {socket.gethostname()} is gone')
      assert errors.count('\n') == 1


def test_an_error_caused_by_a_lost_peer_is_not_reported(run):
  # Gloo and NCCL raise where a peer is gone; what counts is why it is.
  done, _ = run('if index == 1: raise config.UserError("data", "x", "y")\nif index == 2: raise RuntimeError("broken pipe")\n'
                'broadcast("never")')
  assert [errors for _, _, errors in done] == ["error: process 1: data: 'x', expected: y\n", "error: data: 'x', expected: y\n",
                                               "error: process 1: data: 'x', expected: y\n"]


def test_a_bug_is_a_traceback_in_its_process_and_a_line_elsewhere(run):
  done, _ = run('if index == 1: raise RuntimeError("a bug")\nbroadcast("never")')
  assert [status for status, _, _ in done] == [1] * 3
  assert 'Traceback' in done[1][2] and done[0][2] == done[2][2] == 'error: process 1: RuntimeError: a bug\n'


def test_a_broken_pipe_ends_all_processes_silently(run):
  done, _ = run('if first:\n  read, write = os.pipe()\n  os.dup2(write, 1)\n  os.close(read)\n  print("lost", flush=True)\n'
                'broadcast("never")')
  assert done == [(0, '', '')] * 3
