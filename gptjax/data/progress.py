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


def counted(documents: int) -> str:
  """'1 document', '2,000 documents'."""
  return f'{documents:,} document{"s" * (documents != 1)}'


def progress(title: str, documents: Sequence[T]) -> Iterator[T]:
  """Yields the documents; a bar counts them, or, where stderr is not a terminal, one line names the work."""
  if not sys.stderr.isatty():
    announce(f'{title}: {counted(len(documents))}')
    yield from documents
  else:
    console = rich.console.Console(stderr=True)
    yield from rich.progress.track(documents, description=title, console=console, transient=True)
