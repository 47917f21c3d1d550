"""The rendezvous: every process of a run comes to process 0, within a stated time, or all end with one line that says who did not.

JAX's own start aborts the process from C++ where a peer is missing, and does not notice peers of other code or configs. So
this comes first, at the same address: process 0 stops listening when all are there, and JAX's service takes the port. The
connections stay, for `ProcessGroup`.
"""

import contextlib
import dataclasses
import ipaddress
import select
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any, cast

from gptjax.config import UserError
from gptjax.distributed.connection import Closed, Connection
from gptjax.distributed.discovery import GroupSpec

_STRANGER = 10.0
"""Seconds in which who connects has to say who it is."""
_LATE = 5.0
"""Seconds that process 0 tries to listen, and that it stays to tell those that come after a run has failed to start."""


@dataclasses.dataclass(frozen=True)
class Peer:
  """Another process of the run."""

  index: int
  host: str
  connection: Connection

  def __str__(self) -> str:
    return f'process {self.index} on {self.host}'


@dataclasses.dataclass(frozen=True)
class _Attendance:
  """What is wrong where not all came: the value of that error."""

  group: GroupSpec
  timeout: float
  came: frozenset[int]

  def __repr__(self) -> str:
    missing = [index for index in range(self.group.count) if index not in self.came]
    named = ', '.join(f'process {index}' for index in missing[:20]) + (f' and {len(missing) - 20} more' if len(missing) > 20 else '')
    return f'{len(self.came)} of {self.group.count} came within {self.timeout:g} s, missing: {named}'


def meet(group: GroupSpec, facts: Mapping[str, str], timeout: float) -> list[Peer]:
  """Waits until all processes of a group are here.

  Args:
    group: of at least two.
    facts: what must be the same in every process, by name.
    timeout: seconds.

  Returns:
    The others in their order for process 0, and process 0 alone for the others.

  Raises:
    UserError: not all came in time, or two differ that must not; every process that came raises the same, so far as it can be told.
  """
  deadline = time.monotonic() + timeout
  return _gather(group, facts, timeout, deadline) if group.index == 0 else [_go(group, facts, timeout, deadline)]


def address(group: GroupSpec) -> tuple[str, int]:
  """Host and port of the coordinator."""
  assert group.coordinator
  host, _, port = group.coordinator.rpartition(':')
  return host.strip('[]'), int(port)


def bind_address(group: GroupSpec) -> str:
  """The host that process 0 listens on: this machine alone where the coordinator says so, else '' for every interface."""
  host = '127.0.0.1' if address(group)[0] == 'localhost' else address(group)[0]
  with contextlib.suppress(ValueError):
    if ipaddress.ip_address(host).is_loopback:
      return host
  return ''


def _listen(group: GroupSpec, deadline: float) -> socket.socket:
  host, port = bind_address(group), address(group)[1]
  both = not host and socket.has_dualstack_ipv6()
  deadline = min(deadline, time.monotonic() + _LATE)
  while True:
    try:
      return socket.create_server((host, port), family=socket.AF_INET6 if both or ':' in host else socket.AF_INET,
                                  dualstack_ipv6=both, backlog=1024)
    except OSError as error:
      if time.monotonic() > deadline:
        raise UserError('--coordinator', group.coordinator, f'a port that is free on this host; {error.strerror or error}') from None
      time.sleep(0.25)  # what has it, such as the same run a moment ago, may be about to end


def _gather(group: GroupSpec, facts: Mapping[str, str], timeout: float, deadline: float) -> list[Peer]:
  with _listen(group, deadline) as listener, selectors.DefaultSelector() as selector:
    gathering = _Gathering(group, facts, listener, selector)
    while not gathering.complete and (left := deadline - time.monotonic()) > 0:
      gathering.serve(min(left, 1.0))
    if not gathering.complete:
      here = ', '.join([f'process 0 on {socket.gethostname()}', *map(str, gathering.peers())])
      gathering.fail(UserError('peers', _Attendance(group, timeout, frozenset({0, *gathering.came})),
                               f'all {group.count} within --rendezvous_timeout; came: {here}'))
    if gathering.failure:
      deadline = min(deadline, time.monotonic() + _LATE)
      while gathering.told < group.count - 1 and (left := deadline - time.monotonic()) > 0:
        gathering.serve(left)
      raise gathering.failure
    for connection in gathering.strangers:
      connection.close()
  for peer in gathering.peers():
    peer.connection.send(go=socket.gethostname())
  return gathering.peers()


class _Gathering:
  """What process 0 knows while the others come."""

  def __init__(self, group: GroupSpec, facts: Mapping[str, str], listener: socket.socket, selector: selectors.BaseSelector):
    self._group, self._facts, self._listener, self._selector = group, facts, listener, selector
    self.came: dict[int, Peer] = {}
    self.strangers: set[Connection] = set()
    """who connected and has not said who it is"""
    self.failure: UserError | None = None
    self.told = 0
    """processes that heard of the failure"""
    selector.register(listener, selectors.EVENT_READ)

  @property
  def complete(self) -> bool:
    """Whether there is nothing to wait for."""
    return self.failure is not None or len(self.came) == self._group.count - 1

  def peers(self) -> list[Peer]:
    """Those that came, in order."""
    return [self.came[index] for index in sorted(self.came)]

  def fail(self, error: UserError) -> None:
    """Tells all that came; who comes later is told then."""
    self.failure = error
    for peer in self.came.values():
      self._tell(peer.connection)

  def serve(self, seconds: float) -> None:
    """Hears whoever speaks within this time."""
    for connection in [one for one in self.strangers if time.monotonic() - one.since > _STRANGER]:
      self._drop(connection)
    for key, _ in self._selector.select(seconds):
      if key.fileobj is self._listener:
        with contextlib.suppress(OSError):
          connection = Connection(self._listener.accept()[0])
          self.strangers.add(connection)
          self._selector.register(connection, selectors.EVENT_READ)
        continue
      connection = cast(Connection, key.fileobj)
      try:
        for message in connection.receive():
          self._greet(_greeted(message, connection), message)
      except Closed:
        self._drop(connection)

  def _greet(self, peer: Peer, message: dict[str, Any]) -> None:
    self.strangers.discard(peer.connection)
    if not self.failure:
      try:
        _compare(self._group, self._facts, peer, message, self.came.get(peer.index))
      except UserError as error:
        self.fail(error)
    if self.failure:
      self._tell(peer.connection)
    else:
      self.came[peer.index] = peer
      peer.connection.send(wait=True)

  def _tell(self, connection: Connection) -> None:
    connection.send(error=str(self.failure))
    self.told += 1

  def _drop(self, connection: Connection) -> None:
    self._selector.unregister(connection)
    connection.close()
    self.strangers.discard(connection)
    self.came = {index: peer for index, peer in self.came.items() if peer.connection is not connection}  # it may come again


def _greeted(message: dict[str, Any], connection: Connection) -> Peer:
  """Who says hello; who says something else is a stranger."""
  match message:
    case {'gptjax': dict(), 'process': int(index), 'processes': int(), 'host': str(host)}:
      return Peer(index, host[:100], connection)
  raise Closed('something else')


def _compare(group: GroupSpec, facts: Mapping[str, str], peer: Peer, message: dict[str, Any], same: Peer | None) -> None:
  """Raises a UserError where a process is not one of this run."""
  me = socket.gethostname()
  if message['processes'] != group.count:
    raise UserError('--processes', message['processes'], f'{group.count}, as process 0 on {me} has it; the other is of {peer}')
  if same or not 0 < peer.index < group.count:
    other = str(same) if same else f'process 0 on {me}'
    raise UserError('--process', peer.index, f'a number for each process; {peer} came, and {other} was there before')
  theirs = message['gptjax']
  for name in sorted({*facts, *theirs}):
    if theirs.get(name) != facts.get(name):
      raise UserError(name, theirs.get(name), f'{facts.get(name)!r}, as process 0 on {me} has it; the other is of {peer}')


def _go(group: GroupSpec, facts: Mapping[str, str], timeout: float, deadline: float) -> Peer:
  reason = 'nobody answers'
  while (left := deadline - time.monotonic()) > 0:
    try:
      sock = socket.create_connection(address(group), timeout=min(left, 10))
    except OSError as error:  # not started yet, or its name not known yet
      reason = error.strerror or str(error)
    else:
      connection = Connection(sock)
      try:
        if sock.getsockname() == sock.getpeername():  # TCP can call itself where nobody listens
          raise Closed('nobody answers')
        connection.send(gptjax=dict(facts), process=group.index, processes=group.count, host=socket.gethostname())
        return _released(connection, timeout, deadline)
      except Closed as error:
        reason = str(error)
      except BaseException:
        connection.close()
        raise
      connection.close()
    time.sleep(min(0.25, max(deadline - time.monotonic(), 0)))
  raise UserError('--coordinator', group.coordinator, f'the address of process 0; process {group.index} did not meet it there within '
                  f'{timeout:g} s: {reason}')


def _released(connection: Connection, timeout: float, deadline: float) -> Peer:
  """Waits until process 0, once reached, says what becomes of all: it may have started later, and then waits longer than we would."""
  while (left := deadline - time.monotonic()) > 0:
    if select.select([connection], [], [], left)[0]:
      messages = connection.receive()
      while messages:
        match messages.pop(0):
          case {'wait': True}:
            deadline = time.monotonic() + timeout + 5
          case {'error': str(text)}:
            raise UserError.from_text(text)
          case {'go': str(host)}:
            connection.unread = messages  # process 0 may have gone on already
            return Peer(0, host, connection)
          case _:
            raise Closed('something else answers there')
  raise Closed('it does not answer')
