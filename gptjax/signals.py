"""How SIGINT and SIGTERM end a program: with one line and status 130 or 143, from the first import on.

Python's own way would be a traceback for SIGINT, or a crash where it falls into the import of an extension module, and nothing at all for
SIGTERM. Programs import this module before all others, so it imports little itself.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = signal.SIGINT, signal.SIGTERM
_RETURN, _CLEANUP = 1.0, 10.0
"""Seconds in which the main thread may return from a computation, and then clean up, before the program ends without that."""

_unwinds = False
"""whether a signal raises Interrupted, because something may have to be cleaned up"""
_ending = False

leave: Callable[[int, str], object] = lambda status, line: os._exit(status)
"""ends the process once its line is printed; the processes of a run replace it, to tell each other"""


class Interrupted(KeyboardInterrupt):
  """A signal that ends the program; its text is the line to print."""

  def __init__(self, number: int):
    super().__init__(f'{signal.Signals(number).name}: ended')
    self.number = number


def install_handlers() -> None:
  """Handles SIGINT and SIGTERM from now on, except those that the program's caller has it ignore, as a shell does for a background job.

  Only in a program of this project: `python -m gptjax.NAME`, `python -m tools.NAME` or an installed script; not in a worker of one, nor in
  a process that imports one.
  """
  command = [*sys.orig_argv, '', '']
  name = command[command.index('-m') + 1] if '-m' in command else os.path.basename(command[1])
  if not name.startswith(('gptjax.', 'gptjax-', 'tools.')):
    return
  for number in _SIGNALS:
    if signal.getsignal(number) is not signal.SIG_IGN:
      signal.signal(number, _handle)
  atexit.register(_ignore)  # the first function that is registered runs last


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
  """In this context a signal raises Interrupted in the main thread, except within an import; outside of it the program ends at once."""
  global _unwinds
  _unwinds = True
  try:
    yield
  finally:
    _unwinds = False


def watch() -> None:
  """Starts a thread that ends the program where the main thread does not, because it waits for a compilation, for example."""
  if signal.getsignal(signal.SIGTERM) is not _handle:
    return
  import threading
  read, write = os.pipe()
  os.set_blocking(write, False)
  signal.set_wakeup_fd(write, warn_on_full_buffer=False)
  threading.Thread(target=_watch, args=(read,), name='signals', daemon=True).start()


def end(number: int, line: str = '') -> None:
  """Ends the program at once. Exit handlers are skipped: threads of XLA that still run crash in Python's own end."""
  global _ending
  if not _ending:
    _ending = True
    line = line or str(Interrupted(number))
    start = '\x1b[?25h\n' if os.isatty(2) else ''  # shows the cursor and leaves the line of a progress bar
    try:
      os.write(2, f'{start}{line}\n'.encode(errors='replace'))
    except OSError:  # the reader of stderr may have been ended by the same signal
      pass
    leave(128 + number, line)
  os._exit(128 + number)


def _handle(number: int, frame: FrameType | None) -> None:
  global _unwinds
  if not _unwinds or _imports(frame):
    end(number)
  _unwinds = False  # a second signal does not wait
  sys.unraisablehook = lambda unraisable: None  # libraries that the exception interrupts would print that it was ignored
  raise Interrupted(number)


def _imports(frame: FrameType | None) -> bool:
  """Whether an import is under way: extension modules crash if code that they call while they are initialized raises this."""
  while frame and frame.f_code.co_filename != '<frozen importlib._bootstrap>':
    frame = frame.f_back
  return frame is not None


def _watch(read: int) -> None:
  while True:
    number = os.read(read, 1)[0]
    if signal.getsignal(number) is _handle:  # training has its own handler
      if not select.select([read], [], [], _RETURN)[0] and not _unwinds:
        select.select([read], [], [], _CLEANUP)  # or until a second signal
      end(number)


def _ignore() -> None:
  for number in _SIGNALS:
    signal.signal(number, signal.SIG_IGN)
