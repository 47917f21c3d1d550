"""Progress of long operations on stderr: a bar on a terminal, a line per minute in a log."""

import sys
import time

import rich.console
import rich.progress

_LOG_INTERVAL = 60  # seconds


def console(markup: bool = False) -> rich.console.Console:
  """Prints tables on stdout, into a file or pipe without cutting them to the width of a terminal; without `markup` text as it is."""
  return rich.console.Console(highlight=False, soft_wrap=True, markup=markup, width=None if sys.stdout.isatty() else 10_000)


def announce(line: str) -> None:
  """Prints one line on stderr."""
  print(line, file=sys.stderr, flush=True)


def counted(documents: int) -> str:
  """'1 document', '2,000 documents'."""
  return f'{documents:,} document{"s" * (documents != 1)}'


class ProgressBar:
  """A context manager that shows the progress of an operation, unless `shown` is false; the unit is 'bytes', shown as MB, or a plural
  noun."""

  def __init__(self, title: str, total: int, unit: str, done: int = 0, shown: bool = True):
    self._title, self._total, self._unit, self._done, self._first = title, total, unit, done, done
    self._started = self._logged = time.monotonic()
    amount = ([rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn()] if unit == 'bytes' else
              [rich.progress.MofNCompleteColumn(), rich.progress.TextColumn(unit)])
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn('{task.description}', markup=False), rich.progress.BarColumn(), *amount, rich.progress.TimeRemainingColumn(),
      console=rich.console.Console(stderr=True), transient=True, disable=not (shown and sys.stderr.isatty()))
    self._logs = shown and self._bar.disable
    self._task = self._bar.add_task(title, total=total, completed=done)

  def __enter__(self) -> 'ProgressBar':
    if self._logs:
      announce(f'{self._title}: {self._amount(self._total)}' + (f', {self._amount(self._done)} done before' if self._done else ''))
    self._bar.start()
    return self

  def advance(self, amount: int) -> None:
    """Adds to the amount done."""
    self._done += amount
    self._bar.advance(self._task, amount)
    now = time.monotonic()
    if self._logs and now - self._logged > _LOG_INTERVAL:
      self._logged = now
      left = (self._total - self._done) * (now - self._started) / max(self._done - self._first, 1)
      announce(f'{self._title}: {self._amount(self._done)} of {self._amount(self._total)}, {left / 60:.0f} minutes left')

  def __exit__(self, *error: object) -> None:
    self._bar.stop()

  def _amount(self, amount: int) -> str:
    if self._unit == 'bytes' and amount >= 1e5:
      return f'{amount / 1e6:,.1f} MB'
    return f'{amount:,} {self._unit[:-1] if amount == 1 else self._unit}'
