"""Runs a command as several processes of one run on this machine:

  python -m tools.launch.local --processes=4 --devices=2 -- python -m gptjax.train --config=... --workdir=...

Each process has --devices virtual CPU devices, or without the flag an equal part of this machine's GPUs. The output of process 0 is not
changed; that of the others goes to stderr with [INDEX] before each line. When a process fails, all end, and its status is returned.
SIGTERM and SIGINT are forwarded to all processes, which may save before they end; a second signal kills them.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from absl import flags

from gptjax import config as configs
from gptjax.distributed import visible_gpus

_COUNT = flags.DEFINE_integer('processes', 2, 'number of processes to start', lower_bound=1)
_DEVICES = flags.DEFINE_integer('devices', 0, 'virtual CPU devices per process; 0: divide the GPUs', lower_bound=0)

_GRACE = 3.0
"""Seconds in which the others may end by themselves after one failed."""
_TERMINATED = 5.0
"""Seconds from SIGTERM to SIGKILL."""


def launch(command: list[str], processes: int, devices: int = 0) -> int:
  """Runs a command several times at once, as the processes of one run; returns 0 or the status of the first that failed.

  Args:
    command: a binary that calls gptjax.start, with its flags.
    processes: number of processes.
    devices: virtual CPU devices per process; 0: divide the GPUs.

  Raises:
    UserError: no command, or GPUs that cannot be divided evenly.
  """
  if not command:
    raise configs.UserError('command', None, 'a command after --, such as: -- python -m gptjax.train --config=...')
  shares = [[]] * processes if devices else _shares(processes)
  running: list[subprocess.Popen] = []
  relays: list[threading.Thread] = []
  coordinator = f'localhost:{_free_port()}'
  forward = _forward(running) if threading.current_thread() is threading.main_thread() else lambda: None
  try:
    for index in range(processes):
      more = [f'--coordinator={coordinator}', f'--processes={processes}', f'--process={index}']
      more += [f'--cpu_devices={devices}'] if devices else []
      environment = os.environ | ({} if devices else {'CUDA_VISIBLE_DEVICES': ','.join(shares[index])})
      pipes = {} if index == 0 else {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'stdin': subprocess.DEVNULL}
      # Own process groups, so that child processes such as data workers end with them.
      process = subprocess.Popen([*command, *more], env=environment, process_group=0, **pipes)
      running.append(process)
      forward()
      if index:
        relays.append(threading.Thread(target=_relay, args=(process, index), daemon=True))
        relays[-1].start()
    return _watch(running)
  finally:
    _end(running)
    for relay in relays:
      relay.join(5)  # the last lines give the reason


def _watch(running: list[subprocess.Popen]) -> int:
  """Waits until all have ended, or briefly after one failed; returns 0, or the status of that one as a shell reports it."""
  failed, deadline = 0, float('inf')
  while any(process.poll() is None for process in running) and time.monotonic() < deadline:
    time.sleep(0.05)
    if not failed and (failed := next((process.returncode for process in running if process.poll()), 0)):
      deadline = time.monotonic() + _GRACE
  failed = failed or next((process.returncode for process in running if process.returncode), 0)
  return 128 - failed if failed < 0 else failed


def _end(running: list[subprocess.Popen]) -> None:
  """Ends the remaining processes of all groups."""
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
  """Returns the GPUs of each process, as CUDA_VISIBLE_DEVICES names them."""
  found = visible_gpus(os.environ)
  if not found or len(found) % processes:
    raise configs.UserError('--processes', processes, f'a divisor of the {len(found)} GPUs here, or --devices=N for virtual CPU devices')
  each = len(found) // processes
  return [found[index * each:(index + 1) * each] for index in range(processes)]


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(('localhost', 0))
    return found.getsockname()[1]


def _forward(running: list[subprocess.Popen]) -> Callable[[], None]:
  """Forwards the first signal to all; the second one, and SIGHUP, end them through `finally`. Returns a function that forwards an earlier
  signal to processes that were started after it."""
  received: list[int] = []
  told: set[int] = set()

  def end(number, frame):
    sys.exit(128 + number)

  def forward(number, frame):
    for one in (signal.SIGTERM, signal.SIGINT):
      signal.signal(one, end)
    received.append(number)
    tell()

  def tell():
    for process in running if received else ():
      if process.pid not in told:
        told.add(process.pid)
        process.send_signal(received[0])

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, forward)
  signal.signal(signal.SIGHUP, end)
  return tell


def main(_) -> int:
  return launch(_COMMAND, _COUNT.value, _DEVICES.value)


if __name__ == '__main__':
  at = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
  _COMMAND = sys.argv[at + 1:]
  del sys.argv[at:]
  configs.run(main, needs_config=False)
