"""Python commands as a user types them, forked from a process that has imported JAX: a command of its own spends seconds on that."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

cpu_seconds: list[float] = []
"""of each command"""

SERVER = """
import gc, json, os, runpy, sys
import flax.nnx, jax, matplotlib.figure, optax, orbax.checkpoint
import gptjax.evaluation, gptjax.inference, gptjax.interop, gptjax.training

gc.freeze()
gc.set_threshold(200_000, 50, 100)  # as of the tests
for line in sys.stdin:
  child = os.fork()
  if not child:
    break
  _, status, usage = os.wait4(child, 0)
  print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, flush=True)
else:
  sys.exit()

# The child goes on as a process of its own would, and ends like one.
request = json.loads(line)
os.chdir(request['folder'])
os.environ.clear()
os.environ.update(request['environment'])
for stream, path in enumerate(request['streams']):
  os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), stream)
sys.argv = ['-m', *request['arguments']]
sys.orig_argv = [sys.executable, '-m', request['module'], *request['arguments']]
if request['only_parse']:
  import gptjax.config
  parse = gptjax.config.run
  gptjax.config.run = lambda main, **options: parse(lambda config: None, **options)
sys.path[0] = request['folder']
runpy.run_module(request['module'], run_name='__main__', alter_sys=True)
"""


@functools.cache
def _server():
  """The process that forks; it ends with the pipe to it."""
  return subprocess.Popen([sys.executable, '-c', SERVER], cwd=ROOT, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def end_server():
  """Waits for the process that forks, so that its time counts as that of the tests."""
  if _server.cache_info().currsize:
    _server().communicate()


def run_module(module, *arguments, folder=ROOT, environment=None, given='', only_parse=False):
  """What `python -m module arguments` returns and prints, as of subprocess.run; `given` is what it reads from standard input.

  With only_parse the command ends where its flags are parsed and its config is resolved.

  JAX reads its own variables of the environment as it is imported: they are those of the tests.
  """
  with tempfile.TemporaryDirectory() as streams:
    paths = [Path(streams) / name for name in ('in', 'out', 'err')]
    for path, text in zip(paths, (given, '', ''), strict=True):
      path.write_text(text)
    request = {'module': module, 'arguments': [*map(str, arguments)], 'folder': str(folder), 'only_parse': only_parse,
               'environment': dict(os.environ if environment is None else environment), 'streams': [*map(str, paths)]}
    server = _server()
    server.stdin.write(json.dumps(request) + '\n')
    server.stdin.flush()
    code, seconds = server.stdout.readline().split()
    cpu_seconds.append(float(seconds))
    return subprocess.CompletedProcess([module, *arguments], int(code), paths[1].read_text(), paths[2].read_text())
