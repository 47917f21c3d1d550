"""The processes of a run, once they have met: they wait for each other, and when one ends all end, each with one line."""

import contextlib
import os
import queue
import select
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

from gptjax.config import exit_status
from gptjax.distributed.connection import Closed, Connection
from gptjax.distributed.discovery import GroupSpec
from gptjax.distributed.rendezvous import Peer, meet

_OWN_WORDS = 1.0
"""Seconds in which a process may end by itself after another did: the same mistake is often found by all."""
_LAST = 5.0
"""Seconds that process 0 waits for the others to end: JAX's service dies with it, and aborts whoever is left."""


class ProcessGroup:
  """The processes of a run, over the connections of their rendezvous, which stay open for as long as it lasts.

  A thread reads them, so that the end of a process ends the others even where they wait inside a device computation, which
  would otherwise be for minutes or for ever. As a context manager it ends this process: when its body ends, when all have come
  to that; when it raises, at once, after telling the others.

  Args:
    group: of the run.
    peers: what `meet` returned.
  """

  def __init__(self, spec: GroupSpec | None = None, peers: list[Peer] | None = None):
    self.spec = spec or GroupSpec()
    self._peers = {peer.connection: peer for peer in peers or []}
    self._hosts = sorted({peer.host for peer in self._peers.values()} | {os.uname().nodename})
    self._came: queue.Queue[tuple[int, str, Any]] = queue.Queue()  # who waits for what, and brought which value; of process 0
    self._told: queue.Queue[dict[str, Any]] = queue.Queue()  # what process 0 said to go on with; of the others
    self._ending = threading.Lock()  # who has it ends this process
    self._over = threading.Event()  # another process ended with an error
    self._parted: set[int] = set()
    if self._peers:
      threading.Thread(target=self._listen, name='process group', daemon=True).start()

  @property
  def index(self) -> int:
    """Of this process."""
    return self.spec.index

  @property
  def count(self) -> int:
    """Of the processes of the run."""
    return self.spec.count

  @property
  def description(self) -> str:
    """One line: how many, found where."""
    if not self._peers:
      return f'1, {self.spec.source}'
    hosts = f', hosts {", ".join(self._hosts[:8])}' + (', ...' if len(self._hosts) > 8 else '') if self.index == 0 else ''
    return f'{self.count}, {self.spec.source}{hosts}, coordinator {self.spec.coordinator}'

  def broadcast(self, name: str, value: Any = None) -> Any:
    """Waits until all processes are here; returns the value, of JSON, that process 0 came with.

    It takes no device and has no timeout: a process may work for hours while the others wait here for it.
    """
    return self._meet(name, None if self.index else value, lambda values: values[0])

  def all_gather(self, name: str, value: Any) -> list[Any]:
    """Waits until all processes are here; returns the values, small ones of JSON, that they came with, in their order."""
    return self._meet(name, value, lambda values: values)

  def _meet(self, name: str, value: Any, answer: Callable[[list[Any]], Any]) -> Any:
    """Process 0 makes the answer out of the values of all, and every process returns it."""
    if not self._peers:
      return answer([value])
    if self.index == 0:
      values = {0: value}
      for _ in self._peers:
        index, other, values[index] = self._came.get()
        assert other == name, f'process {index} is at {other!r}, this one at {name!r}'
      value = answer([values[index] for index in sorted(values)])
      for peer in self._peers.values():
        peer.connection.send(go_on=name, value=value)
      return value
    self._leader.connection.send(at=name, value=value)
    message = self._told.get()
    assert message['go_on'] == name, f'process 0 is at {message["go_on"]!r}, this one at {name!r}'
    return message['value']

  def end(self, status: int, text: str) -> NoReturn:
    """Ends this process at once from any thread, and the others with it, which say `text`."""
    if not self._ending.acquire(blocking=False):
      threading.Event().wait()  # another thread is at it
    self._leave(status, None, f'process {self.index}: {text}' if self._peers else text)

  def __enter__(self) -> 'ProcessGroup':
    return self

  def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
    if not self._peers:
      return
    if error is None or isinstance(error, SystemExit):
      self.broadcast('end')
      for peer in self._peers.values():
        peer.connection.send(end=None)
      return
    status, line = exit_status(error)
    # A computation that fails may do so because a peer is gone, whose end is then the one to tell. Either way one thread ends this.
    if (status == 1 and self._over.wait(2)) or not self._ending.acquire(blocking=False):
      threading.Event().wait()
    if line is None:
      traceback.print_exception(error)
    reason = (line or '').removeprefix('error: ') or f'{type(error).__name__}: {error}'.strip(': ')
    self._leave(status, line, f'process {self.index}: {reason}')

  @property
  def _leader(self) -> Peer:
    return next(iter(self._peers.values()))

  def _listen(self) -> None:
    with selectors.DefaultSelector() as selector:
      for connection, peer in self._peers.items():
        selector.register(connection, selectors.EVENT_READ)
        for message in connection.unread:
          self._heard(peer, message)
      while selector.get_map():
        for key, _ in selector.select():
          peer = self._peers[cast(Connection, key.fileobj)]
          try:
            for message in peer.connection.receive():
              self._heard(peer, message)
          except Closed as closed:
            selector.unregister(peer.connection)
            if peer.index not in self._parted:
              self._end(1, f'{peer} is gone: {closed}')

  def _heard(self, peer: Peer, message: dict[str, Any]) -> None:
    match message:
      case {'at': str(name), 'value': value}:
        self._came.put((peer.index, name, value))
      case {'go_on': _}:
        self._told.put(message)
      case {'end': None}:
        self._parted.add(peer.index)
      case {'end': str(text), 'status': int(status)}:
        self._parted.add(peer.index)
        self._over.set()
        time.sleep(_OWN_WORDS)
        self._end(status, text)

  def _end(self, status: int, text: str) -> None:
    """Ends this process because another ended, unless it is about to end by itself."""
    self._over.set()
    if self._ending.acquire(blocking=False):
      self._leave(status, f'error: {text}' if status else None, text)

  def _leave(self, status: int, line: str | None, text: str) -> NoReturn:
    if line:
      print(line, file=sys.stderr)
    for peer in self._peers.values():
      peer.connection.send(end=text, status=status)
    if self.index == 0:
      self._wait_for_the_others()
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(status)  # not by way of what JAX does at exit, which waits for those that will not come

  def _wait_for_the_others(self) -> None:
    left, deadline = {*self._peers}, time.monotonic() + _LAST
    while left and (seconds := deadline - time.monotonic()) > 0:
      for connection in select.select(left, [], [], seconds)[0]:
        try:
          connection.receive()
        except Closed:
          left.remove(connection)


_process_group = ProcessGroup()


def join(group: GroupSpec, facts: Mapping[str, str], timeout: float) -> ProcessGroup:
  """Meets the other processes of a group; from now on `process_group` is theirs.

  Args:
    group: of the run.
    facts: what must be the same in all, by name.
    timeout: seconds within which all must be there.

  Raises:
    UserError: they are not, or one is not of this run.
  """
  global _process_group
  _process_group = ProcessGroup(group, meet(group, facts, timeout) if group.count > 1 else [])
  return _process_group


def process_group() -> ProcessGroup:
  """The processes of the run that this one belongs to; this one alone unless it joined others."""
  return _process_group


def is_primary() -> bool:
  """Whether this is process 0, which alone writes and prints."""
  return _process_group.index == 0


def broadcast(name: str, value: Any = None) -> Any:
  """Waits until all processes are here; returns the value that process 0 came with."""
  return _process_group.broadcast(name, value)


def all_gather(name: str, value: Any) -> list[Any]:
  """Waits until all processes are here; returns the values that they came with, in their order."""
  return _process_group.all_gather(name, value)
