"""Runs the project's commands inside this process, as `python -m` would, and says how each ended.

A process a command would take seconds to start; what starts only once, such as JAX, is what several commands here share.
"""

import contextlib
import dataclasses
import io
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import util
from unittest import mock

from absl import flags


class Late(BaseException):
  """The time limit of a command is exceeded. It is not an Exception, so that the command does not catch it."""


@dataclasses.dataclass(frozen=True)
class Ending:
  """How a command ended."""

  status: object
  """its exit status; None: it let an exception through"""
  out: str
  err: str
  trace: str
  """of that exception"""
  seconds: float

  @property
  def errors(self) -> list[str]:
    """The lines that report an error."""
    return [line for line in self.err.splitlines() if line.startswith('error: ')]

  @property
  def noisy(self) -> bool:
    """Whether only stderr is wrong, to which threads of an earlier command may have written."""
    return not self.trace and self.status in (0, 2) and bool(self.wrong)

  @property
  def wrong(self) -> str:
    """How it differs from status 0, or status 2 and one error line, which is the last; '' if it does not."""
    if self.trace:
      return self.trace
    if 'Traceback' in self.err:
      return f'a traceback on stderr: {self.err[-2000:]}'
    if self.status not in (0, 2):
      return f'status {self.status}: {self.err[-500:]}'
    if self.errors != self.err.splitlines()[-1:] * (self.status == 2):
      return f'status {self.status} with other than one error line at the end: {self.err[-500:]}'
    return ''


def alone(module: str, *args: str, seconds: float) -> Ending:
  """Runs a module in a process of its own, from the folder that this one is in."""
  import jax
  started = time.monotonic()
  root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  try:
    done = subprocess.run([sys.executable, '-m', module, *args], capture_output=True, text=True, errors='replace', timeout=seconds,
                          env={**os.environ, 'PYTHONPATH': root, 'JAX_NUM_CPU_DEVICES': str(jax.local_device_count()),
                               'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})  # where this one is so: figures are compared to the bit
  except subprocess.TimeoutExpired as late:
    return Ending(None, '', '', str(late), seconds)
  return Ending(done.returncode, done.stdout, done.stderr, '', time.monotonic() - started)


def run(module: str, *args: str, seconds: float) -> Ending:
  """Runs a module as `python -m` does; interrupts it after `seconds`, which counts as an exception of the module."""
  found = util.find_spec(module)
  assert found and found.origin
  out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8', errors) for errors in ('strict', 'backslashreplace'))
  status: object = None
  trace, started = '', time.monotonic()
  with _own_flags(found.origin), mock.patch.object(sys, 'argv', [module, *args]), contextlib.redirect_stdout(out), \
      contextlib.redirect_stderr(err):
    try:
      with _interrupted_after(seconds):
        runpy.run_module(module, run_name='__main__', alter_sys=True)
    except SystemExit as stop:
      status = stop.code or 0
    except KeyboardInterrupt:
      raise
    except BaseException as error:
      trace = ''.join(traceback.format_exception(error))
  texts = [(stream.flush(), stream.buffer.getvalue().decode())[1] for stream in (out, err)]  # type: ignore[attr-defined]
  return Ending(status, *texts, trace, time.monotonic() - started)


@contextlib.contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
  def late(*_):
    raise Late(f'not done after {seconds:g} s')
  before = signal.signal(signal.SIGALRM, late)
  signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again and again, since a callback that it falls into swallows it
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _own_flags(file: str) -> Iterator[None]:
  """Flags as a new process has them: defaults, and of all binaries only those that the body's own defines."""
  known = flags.FLAGS
  others = {module: list(found) for module, found in known.flags_by_module_dict().items()
            if module == sys.argv[0] or (module.startswith(('gptjax.', 'tools.')) and hasattr(sys.modules.get(module), 'main'))}
  for found in others.values():
    for flag in found:
      delattr(known, flag.name)
  known.unparse_flags()
  try:
    yield
  finally:
    for flag in list(known.flags_by_module_dict().get(file, ())):
      delattr(known, flag.name)
    for module, found in others.items():
      for flag in found:
        known[flag.name] = flag
        known.register_flag_by_module(module, flag)
    known.mark_as_parsed()
