"""The processes of a run once they have met: they wait for each other, and when one ends all end, each with one line."""

import contextlib
import os
import queue
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from gptjax import signals
from gptjax.config import exit_status
from gptjax.distributed.discovery import GroupSpec
from gptjax.distributed.rendezvous import Closed, Peer, meet

_OWN_ERROR = 1.0
"""Seconds in which a process may end with its own error after another ended: all often find the same mistake."""
_LAST = 5.0
"""Seconds that process 0 waits for the others to end: JAX's service ends with it, and aborts the processes that are left."""


class ProcessGroup:
  """The processes of a run, over the connections of their rendezvous (`meet`), which stay open until the run ends.

  A thread reads the connections, so that the end of one process ends the others even where they wait inside a device computation, which
  could otherwise take minutes or hang. As a context manager it ends this process: after its body when all processes have got there, and
  on an exception at once, after the others were informed.
  """

  def __init__(self, spec: GroupSpec | None = None, peers: list[Peer] | None = None):
    self._spec = spec or GroupSpec()
    self.index, self.count = self._spec.index, self._spec.count
    self._peers = peers or []
    self._exchanged: queue.Queue[tuple[int, str, Any]] = queue.Queue()  # received: (index of the sender, name, value)
    self._ending = threading.Lock()  # the thread that acquires it ends this process
    self._failed = threading.Event()  # set when another process ended with an error
    self._left: set[int] = set()  # processes that announced their end
    if self._peers:
      signals.leave = self.end
      threading.Thread(target=self._listen, name='process group', daemon=True).start()

  @property
  def description(self) -> str:
    """One line: how many processes, and where that was found."""
    if not self._peers:
      return f'1, {self._spec.source}'
    names = sorted({peer.host for peer in self._peers} | {os.uname().nodename})
    hosts = f', hosts {", ".join(names[:8])}' + (', ...' if len(names) > 8 else '') if self.index == 0 else ''
    return f'{self.count}, {self._spec.source}{hosts}, coordinator {self._spec.coordinator}'

  def exchange(self, name: str, value: Any, reply: Callable[[list[Any]], Any]) -> Any:
    """Waits, with no timeout and no device, until all processes have called this; returns process 0's `reply` to their JSON values."""
    def send(value: Any) -> None:
      for peer in self._peers:
        peer.send(at=name, value=value)

    if self.index:
      send(value)
    received = {self.index: value}
    for _ in self._peers:
      index, other, received[index] = self._exchanged.get()
      assert other == name, f'process {index} is at {other!r}, this one at {name!r}'
    if self.index:
      return received[0]
    value = reply([received[index] for index in sorted(received)])
    send(value)
    return value

  def end(self, status: int, text: str) -> NoReturn:
    """Ends this process at once from any thread, and with it the others, which print `text`."""
    if not self._ending.acquire(blocking=False):
      threading.Event().wait()  # another thread does
    self._exit(status, None, f'process {self.index}: {text}' if self._peers else text)

  def __enter__(self) -> 'ProcessGroup':
    return self

  def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
    if not self._peers:
      return
    if error is None or isinstance(error, SystemExit):
      self.exchange('end', None, lambda values: None)
      for peer in self._peers:
        peer.send(end=None)
      return
    status, line = exit_status(error)
    # A computation may have failed because a peer is gone; then the end of that peer is to be reported, by the thread that reads.
    if (status == 1 and self._failed.wait(2)) or not self._ending.acquire(blocking=False):
      threading.Event().wait()
    if line is None:
      traceback.print_exception(error)
    reason = (line or '').removeprefix('error: ') or f'{type(error).__name__}: {error}'.strip(': ')
    self._exit(status, line, f'process {self.index}: {reason}')

  def _listen(self) -> None:
    with selectors.DefaultSelector() as selector:
      for peer in self._peers:
        selector.register(peer.socket, selectors.EVENT_READ, peer)
        for message in peer.unread:
          self._handle(peer, message)
      while selector.get_map():
        for key, _ in selector.select():
          peer = key.data
          try:
            for message in peer.receive():
              self._handle(peer, message)
          except Closed as closed:
            selector.unregister(key.fileobj)
            if peer.index not in self._left:
              self._follow(1, f'{peer} is gone: {closed}')

  def _handle(self, peer: Peer, message: dict[str, Any]) -> None:
    match message:
      case {'at': str(name), 'value': value}:
        self._exchanged.put((peer.index, name, value))
      case {'end': None}:
        self._left.add(peer.index)
      case {'end': str(text), 'status': int(status)}:
        self._left.add(peer.index)
        self._failed.set()
        time.sleep(_OWN_ERROR)
        self._follow(status, text)

  def _follow(self, status: int, text: str) -> None:
    """Ends this process because another one ended, unless another thread does."""
    self._failed.set()
    if self._ending.acquire(blocking=False):
      self._exit(status, f'error: {text}' if status else None, text)

  def _exit(self, status: int, line: str | None, text: str) -> NoReturn:
    if line:
      print(line, file=sys.stderr)
    for peer in self._peers:
      peer.send(end=text, status=status)
    deadline = time.monotonic() + _LAST
    for peer in self._peers if self.index == 0 else ():
      with contextlib.suppress(Closed):
        while (left := deadline - time.monotonic()) > 0:
          peer.socket.settimeout(left)
          peer.receive()
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    os._exit(status)  # skips JAX's exit handlers, which would wait for processes that are gone


_process_group = ProcessGroup()


def join(group: GroupSpec, facts: Mapping[str, str], timeout: float) -> ProcessGroup:
  """Meets the other processes of a group, as `meet` does; `process_group` then returns them."""
  global _process_group
  _process_group = ProcessGroup(group, meet(group, facts, timeout) if group.count > 1 else [])
  return _process_group


def process_group() -> ProcessGroup:
  """The processes of this run; only this one before `join`."""
  return _process_group


def is_primary() -> bool:
  """Whether this is process 0, the only one that writes and prints."""
  return _process_group.index == 0


def broadcast(name: str, value: Any = None) -> Any:
  """Waits until all processes are here, and returns process 0's value, of JSON."""
  return _process_group.exchange(name, value if is_primary() else None, lambda values: values[0])


def all_gather(name: str, value: Any) -> list[Any]:
  """Waits until all processes are here, and returns their values, small ones of JSON, by index."""
  return _process_group.exchange(name, value, lambda values: values)
