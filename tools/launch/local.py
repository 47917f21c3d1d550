"""Runs a command as several processes of one run on this machine:

  python -m tools.launch.local --processes=4 --devices=2 -- python -m gptjax.train --config=... --workdir=...

Each process has so many virtual CPU devices, or without --devices its share of this machine's GPUs. The output of process 0 is
shown as it is, that of the others on stderr with [their number] before each line. When one fails all end, and the status is its.
SIGTERM and SIGINT go on to all, which may save before they end; once more ends them.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import flags

from gptjax import config as configs
from gptjax.distributed import visible_gpus

_COUNT = flags.DEFINE_integer('processes', 2, 'processes to start', lower_bound=1)
_DEVICES = flags.DEFINE_integer('devices', 0, 'virtual CPU devices of each; 0: its share of the GPUs', lower_bound=0)

_BY_THEMSELVES = 3.0
"""Seconds that the others have to say their last line after one failed."""
_TERMINATED = 5.0
"""Seconds from SIGTERM to SIGKILL."""


def launch(command: list[str], processes: int, devices: int = 0) -> int:
  """Runs a command of this project so many times at once, as processes of one run; returns 0 or the status of the first that failed.

  Args:
    command: a binary that calls gptjax.start, with its flags.
    processes: how many.
    devices: virtual CPU devices of each; 0: its share of the GPUs.

  Raises:
    UserError: no command, or GPUs that cannot be shared out.
  """
  if not command:
    raise configs.UserError('command', None, 'one after --, as in: -- python -m gptjax.train --config=...')
  shares = [[]] * processes if devices else _shares(processes)
  running: list[subprocess.Popen] = []
  relays: list[threading.Thread] = []
  coordinator = f'localhost:{_free_port()}'
  if threading.current_thread() is threading.main_thread():
    _pass_on(running)
  try:
    for index in range(processes):
      more = [f'--coordinator={coordinator}', f'--processes={processes}', f'--process={index}']
      more += [f'--cpu_devices={devices}'] if devices else []
      environment = os.environ | ({} if devices else {'CUDA_VISIBLE_DEVICES': ','.join(shares[index])})
      pipes = {} if index == 0 else {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'stdin': subprocess.DEVNULL}
      # Groups of their own: what a process starts itself, such as data workers, ends with it.
      process = subprocess.Popen([*command, *more], env=environment, process_group=0, **pipes)
      running.append(process)
      if index:
        relays.append(threading.Thread(target=_relay, args=(process, index), daemon=True))
        relays[-1].start()
    return _watch(running)
  finally:
    _end(running)
    for relay in relays:
      relay.join(5)  # the last lines are those that say why


def _watch(running: list[subprocess.Popen]) -> int:
  """Waits until all are done, or for a little while after one failed; returns 0, or the status of that one as a shell reports it."""
  failed, deadline = 0, float('inf')
  while any(process.poll() is None for process in running) and time.monotonic() < deadline:
    time.sleep(0.05)
    if not failed and (failed := next((process.returncode for process in running if process.poll()), 0)):
      deadline = time.monotonic() + _BY_THEMSELVES
  failed = failed or next((process.returncode for process in running if process.returncode), 0)
  return 128 - failed if failed < 0 else failed


def _end(running: list[subprocess.Popen]) -> None:
  """Ends what is left of every process's group."""
  for number, seconds in ((signal.SIGTERM, _TERMINATED), (signal.SIGKILL, 60.0)):
    for process in running:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    deadline = time.monotonic() + seconds
    for process in running:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(deadline - time.monotonic(), 0))


def _relay(process: subprocess.Popen, index: int) -> None:
  assert process.stdout
  for line in process.stdout:
    sys.stderr.buffer.write(b'[%d] %b' % (index, line if line.endswith(b'\n') else line + b'\n'))
    sys.stderr.buffer.flush()


def _shares(processes: int) -> list[list[str]]:
  """The GPUs of each process, as CUDA_VISIBLE_DEVICES names them."""
  found = visible_gpus(os.environ)
  if not found or len(found) % processes:
    raise configs.UserError('--processes', processes, f'a divisor of the {len(found)} GPUs here, or --devices=N for virtual CPU devices')
  each = len(found) // processes
  return [found[index * each:(index + 1) * each] for index in range(processes)]


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


def _pass_on(running: list[subprocess.Popen]) -> None:
  """Hands the first signal on to all; the second, and SIGHUP, end them by way of `finally`."""
  def end(number, frame):
    sys.exit(128 + number)

  def pass_on(number, frame):
    for one in (signal.SIGTERM, signal.SIGINT):
      signal.signal(one, end)
    for process in running:
      process.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
  signal.signal(signal.SIGHUP, end)


def main(_) -> int:
  return launch(_COMMAND, _COUNT.value, _DEVICES.value)


if __name__ == '__main__':
  at = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
  _COMMAND = sys.argv[at + 1:]
  del sys.argv[at:]
  configs.run(main, needs_config=False)
