"""How long work shows itself: a bar on a terminal, a line now and then in a log; always on stderr."""

import sys
import time
from types import TracebackType

import rich.console
import rich.progress

_EVERY = 60  # seconds between lines of a log


def announce(line: str) -> None:
  """Prints one line on stderr."""
  print(line, file=sys.stderr, flush=True)


def counted(documents: int) -> str:
  """'1 document', '2,000 documents'."""
  return f'{documents:,} document{"s" * (documents != 1)}'


class Work:
  """Long work, as a context.

  Args:
    title: what it does.
    total: how much there is.
    unit: of the total: 'bytes', which are shown as MB, or what is counted, in the plural.
    done: how much is done already.
  """

  def __init__(self, title: str, total: int, unit: str, done: int = 0):
    self._title, self._total, self._unit, self._done, self._first = title, total, unit, done, done
    self._started = self._told = time.monotonic()
    columns = [rich.progress.TextColumn('{task.description}'), rich.progress.BarColumn(),
               *((rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn()) if unit == 'bytes' else
                 (rich.progress.MofNCompleteColumn(), rich.progress.TextColumn(unit))),
               rich.progress.TimeRemainingColumn()]
    self._bar = rich.progress.Progress(*columns, console=rich.console.Console(stderr=True), transient=True,
                                       disable=not sys.stderr.isatty())
    self._task = self._bar.add_task(title, total=total, completed=done)

  def __enter__(self) -> 'Work':
    if self._bar.disable:
      announce(f'{self._title}: {self._amount(self._total)}' + (f', {self._amount(self._done)} done before' if self._done else ''))
    self._bar.start()
    return self

  def advance(self, amount: int) -> None:
    """Tells that so much more is done."""
    self._done += amount
    self._bar.advance(self._task, amount)
    now = time.monotonic()
    if self._bar.disable and now - self._told > _EVERY:
      self._told = now
      left = (self._total - self._done) * (now - self._started) / max(self._done - self._first, 1)
      announce(f'{self._title}: {self._amount(self._done)} of {self._amount(self._total)}, {left / 60:.0f} minutes left')

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
    self._bar.stop()

  def _amount(self, amount: int) -> str:
    if self._unit == 'bytes' and amount >= 1e5:
      return f'{amount / 1e6:,.1f} MB'
    return f'{amount:,} {self._unit[:-1] if amount == 1 else self._unit}'
