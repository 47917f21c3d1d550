"""The program gptjax.serve, as a user starts it; the page of docs."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request

import pytest
from commands import ROOT
from documented import commands_of
from test_command_line import CACHE, call
from tiny import files_below, write_text

pytestmark = pytest.mark.full
PAGE = (ROOT / 'docs/serving.md').read_text()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of a small model of characters."""
  home = tmp_path_factory.mktemp('served')
  text = write_text(home / 'text.txt')
  done = call('train', '--config=configs/experiment.py', f'--workdir={home}/first', f'--cache_dir={CACHE}', '--config.steps=2',
              f'--config.data.source.path={text}', '--config.model.layers=1', '--config.data.context=64', '--config.optimizer.warmup=1')
  assert done.returncode == 0, done.stderr
  return home / 'first'


def test_the_page_is_served_as_it_says(run):
  start, = commands_of('docs/serving.md', '')[1:2]
  program, flag, module, *arguments = shlex.split(start)
  assert (program, flag, module, arguments) == ('python', '-m', 'gptjax.serve', ['--workdir=runs/first'])
  before = files_below(run)
  server = subprocess.Popen([sys.executable, '-m', module, f'--workdir={run}', '--port=0', '--slots=2'], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, 'GPTJAX_API_KEY': 'secret'})
  try:
    line = server.stdout.readline()
    assert re.fullmatch(r'ready: http://127\.0\.0\.1:\d+\n', line), line
    url = line.split()[1]
    curl = re.search(r"curl http://127\.0\.0\.1:8000(\S+) -d '(.*)'", PAGE)
    request = urllib.request.Request(url + curl[1], curl[2].encode(), {'Authorization': 'Bearer secret'})
    with urllib.request.urlopen(request, timeout=60) as answer:
      assert json.load(answer)['model'] == 'first'
    for route in re.findall(r'^\| `GET (\S+)`', PAGE, re.MULTILINE):
      with urllib.request.urlopen(urllib.request.Request(url + route, headers={'Authorization': 'Bearer secret'})) as answer:
        assert answer.status == 200
    port = url.rpartition(':')[2]
    taken = call('serve', f'--workdir={run}', f'--port={port}')
    assert taken.returncode == 2 and taken.stderr.splitlines()[-1].startswith(f"error: --port: '127.0.0.1:{port}', expected: an address")
  finally:
    server.send_signal(signal.SIGTERM)
    server.communicate(timeout=60)
  assert server.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM) and files_below(run) == before


@pytest.mark.parametrize('flags, message', [
  (['--workdir=nowhere'], 'error: --workdir: '), (['--workdir={run}', '--step=7'], 'error: --step: '),
  (['--workdir={run}', '--model_axis=3'], 'error: mesh.model: 3'), (['--workdir={run}', '--host=no.such.host.example'], 'error: --host: '),
  (['--workdir={run}', '--slots=0'], 'error: --slots: ')])
def test_a_mistake_is_one_line(run, flags, message):
  done = call('serve', *(flag.format(run=run) for flag in flags))
  assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
  assert done.stderr.splitlines()[-1].startswith(message), done.stderr
