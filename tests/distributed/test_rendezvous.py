"""All processes join, or all report in time, in one line, which did not or which is of another run."""

import concurrent.futures
import json
import socket
import threading
import time

import pytest

from gptjax.config import UserError
from gptjax.distributed import GroupSpec
from gptjax.distributed.rendezvous import meet

FACTS = {'jax': '1', '--config.seed': '0'}


@pytest.fixture
def port():
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


@pytest.fixture
def join(port):
  """Starts `meet` for some processes, each given as index or (index, facts, processes); returns their outcomes in order."""
  opened = []

  def start(*those, processes=3, timeout=5.0, before=lambda: None):
    def one(index, facts=FACTS, count=processes):
      try:
        return meet(GroupSpec(count, index, f'localhost:{port}'), facts, timeout)
      except UserError as error:
        return str(error)
    with concurrent.futures.ThreadPoolExecutor() as pool:
      running = [pool.submit(one, *(those if isinstance(those, tuple) else (those,))) for those in those]
      before()
      outcomes = [one.result() for one in running]
    opened.extend(peer for outcome in outcomes if isinstance(outcome, list) for peer in outcome)
    return outcomes
  yield start
  for peer in opened:
    peer.socket.close()


def test_all_meet_and_stay_connected(join):
  outcomes = join(2, 0, 1)
  assert [[peer.index for peer in outcome] for outcome in outcomes] == [[0], [1, 2], [0]]
  outcomes[1][1].send(word='hello')
  assert outcomes[0][0].receive() == [{'word': 'hello'}]


def test_the_port_is_free_for_jax_when_all_have_met(join, port):
  outcomes = join(0, 1, 2)
  assert [[peer.index for peer in outcome] for outcome in outcomes] == [[1, 2], [0], [0]]  # and their connections are still open
  with socket.create_server(('localhost', port)) as server, socket.create_connection(('localhost', port), timeout=5):
    assert server.accept()[0].getsockname()[1] == port


def test_missing_processes_are_reported_to_all_in_time(join):
  start = time.monotonic()
  first, other = join(0, 2, processes=4, timeout=1.0)
  assert 1 <= time.monotonic() - start < 2 and first == other
  host = socket.gethostname()
  assert first == ('peers: 2 of 4 joined within 1 s, missing: process 1, process 3, expected: all 4 within --rendezvous_timeout; '
                   f'joined: process 0 on {host}, process 2 on {host}')


def test_a_process_that_cannot_reach_process_0_ends_in_time(join, port):
  start = time.monotonic()
  (line,) = join(1, timeout=1.0)
  assert 1 <= time.monotonic() - start < 2
  assert line == (f"--coordinator: 'localhost:{port}', expected: the address of process 0; process 1 did not reach it there within 1 s: "
                  'Connection refused')


def test_another_program_at_the_address_is_not_process_0(join, port):
  with socket.create_server(('localhost', port)) as server:
    def answer():
      for _ in range(2):
        client, _ = server.accept()
        client.sendall(b'HTTP/1.1 400 Bad Request\r\n\r\n')
        client.close()
    thread = threading.Thread(target=answer)
    thread.start()
    (line,) = join(1, timeout=0.6)
    thread.join()
  assert line.startswith('--coordinator: ') and 'within 0.6 s: ' in line
  with socket.create_server(('localhost', port)):
    (line,) = join(0, timeout=1.0)
  assert line.startswith(f"--coordinator: 'localhost:{port}', expected: a port that is free on this host; ")


@pytest.mark.parametrize('other, field', [
  ((2, FACTS, 4), '--processes: 4, expected: 3, as process 0 on '),
  ((1, FACTS), '--process: 1, expected: a different index for each process; '),
  ((2, {**FACTS, 'jax': '2'}), "jax: '2', expected: '1', as process 0 on "),
  ((2, {**FACTS, '--config.seed': '1'}), "--config.seed: '1', expected: '0', as process 0 on "),
  ((2, {'jax': '1'}), "--config.seed: None, expected: '0', as process 0 on "),
])
def test_a_process_of_another_run_is_reported_to_all(other, field, join):
  start = time.monotonic()
  outcomes = join(0, 1, other)
  assert time.monotonic() - start < 2
  assert outcomes[0].startswith(field) and {*outcomes} == {outcomes[0]}


def test_connections_of_other_programs_are_ignored(join, port):
  opened = []

  def intrude():
    while True:
      try:
        opened.append(socket.create_connection(('localhost', port)))
        break
      except OSError:
        time.sleep(0.01)
    for words in (b'\x00\xff\x16\x03\x01' * 50, b'GET / HTTP/1.1\r\n\r\n', b'{"gptjax": 1}\n', b'[' * 50_000 + b'\n', b'x' * 300_000,
                  b'null\n', json.dumps({'gptjax': {}, 'process': '1', 'processes': 3, 'host': 'h'}).encode() + b'\n', b''):
      stranger = socket.create_connection(('localhost', port))
      opened.append(stranger)
      try:
        stranger.sendall(words)
      except OSError:
        pass
    opened[3].close()
    meeting.submit(join, 1, 2)

  with concurrent.futures.ThreadPoolExecutor() as meeting:
    (first,) = join(0, before=intrude)
  assert [peer.index for peer in first] == [1, 2]
  for stranger in opened:
    stranger.close()


def test_a_process_that_joined_and_died_may_join_again(join, port):
  def die():
    while True:
      try:
        dying = socket.create_connection(('localhost', port))
        break
      except OSError:
        time.sleep(0.01)
    dying.sendall(json.dumps({'gptjax': FACTS, 'process': 1, 'processes': 3, 'host': 'h'}).encode() + b'\n')
    assert b'wait' in dying.recv(1000)
    dying.close()
    time.sleep(0.2)
    meeting.submit(join, 1, 2)

  with concurrent.futures.ThreadPoolExecutor() as meeting:
    (first,) = join(0, before=die)
  assert [peer.index for peer in first] == [1, 2]
