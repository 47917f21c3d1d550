"""How long work shows itself: a bar on a terminal, one line in a log; always on stderr."""

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

import rich.console
import rich.progress

T = TypeVar('T')


def announce(line: str) -> None:
  """Prints one line on stderr."""
  print(line, file=sys.stderr, flush=True)


def progress(title: str, items: Sequence[T]) -> Iterator[T]:
  """Yields the items; a bar counts them, or, where stderr is not a terminal, one line names the work."""
  if not sys.stderr.isatty():
    announce(f'{title}: {len(items)} documents')
    yield from items
  else:
    yield from rich.progress.track(items, description=title, console=rich.console.Console(stderr=True), transient=True)
