"""The rendezvous: every process of a run comes to process 0, within a stated time, or all end with one line that says who did not.

JAX's own start aborts the process from C++ where a peer is missing, and does not notice peers of other code or configs. So
this comes first, at the same address: process 0 stops listening when all are there, and JAX's service takes the port. The
connections stay, for `Company`.
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
from gptjax.processes.connection import Closed, Connection
from gptjax.processes.discovery import Group

_STRANGER = 10.0
"""Seconds in which who connects has to say who it is."""


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

  group: Group
  timeout: float
  came: frozenset[int]

  def __repr__(self) -> str:
    missing = [index for index in range(self.group.processes) if index not in self.came]
    named = ', '.join(f'process {index}' for index in missing[:20]) + (f' and {len(missing) - 20} more' if len(missing) > 20 else '')
    return f'{len(self.came)} of {self.group.processes} came within {self.timeout:g} s, missing: {named}'


def meet(group: Group, facts: Mapping[str, str], timeout: float) -> list[Peer]:
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
  return _gather(group, facts, timeout, deadline) if group.process == 0 else [_go(group, facts, timeout, deadline)]


def address(group: Group) -> tuple[str, int]:
  """Host and port of the coordinator."""
  assert group.coordinator
  host, _, port = group.coordinator.rpartition(':')
  return host.strip('[]'), int(port)


def bind_address(group: Group) -> str:
  """The host that process 0 listens on: this machine alone where the coordinator says so, else '' for every interface."""
  host = '127.0.0.1' if address(group)[0] == 'localhost' else address(group)[0]
  with contextlib.suppress(ValueError):
    if ipaddress.ip_address(host).is_loopback:
      return host
  return ''


def _listen(group: Group) -> socket.socket:
  host, port = bind_address(group), address(group)[1]
  both = not host and socket.has_dualstack_ipv6()
  for last in (*[False] * 20, True):
    try:
      return socket.create_server((host, port), family=socket.AF_INET6 if both or ':' in host else socket.AF_INET,
                                  dualstack_ipv6=both, backlog=1024)
    except OSError as error:
      if last:
        raise UserError('--coordinator', group.coordinator, f'a port that is free on this host; {error.strerror or error}') from None
      time.sleep(0.25)  # what had it before, such as the same run a moment ago, may be about to end
  raise AssertionError


def _gather(group: Group, facts: Mapping[str, str], timeout: float, deadline: float) -> list[Peer]:
  me = socket.gethostname()
  came: dict[int, Peer] = {}
  strangers: set[Connection] = set()
  with _listen(group) as listener, selectors.DefaultSelector() as selector:
    selector.register(listener, selectors.EVENT_READ)

    def drop(connection: Connection) -> None:
      selector.unregister(connection)
      connection.close()
      strangers.discard(connection)
      for peer in [peer for peer in came.values() if peer.connection is connection]:
        del came[peer.index]  # it may come again

    try:
      while len(came) < group.processes - 1:
        now = time.monotonic()
        for connection in [one for one in strangers if now - one.since > _STRANGER]:
          drop(connection)
        if now >= deadline:
          here = ', '.join([f'process 0 on {me}', *(str(came[index]) for index in sorted(came))])
          raise UserError('peers', _Attendance(group, timeout, frozenset({0, *came})),
                          f'all {group.processes} within --rendezvous_timeout; came: {here}')
        for key, _ in selector.select(min(deadline - now, 1)):
          if key.fileobj is listener:
            with contextlib.suppress(OSError):
              connection = Connection(listener.accept()[0])
              strangers.add(connection)
              selector.register(connection, selectors.EVENT_READ)
            continue
          connection = cast(Connection, key.fileobj)
          try:
            for message in connection.receive():
              if peer := _greeted(message, connection):
                strangers.discard(connection)
                _compare(group, facts, peer, message, came.get(peer.index), me)
                came[peer.index] = peer
                connection.send(wait=max(deadline - time.monotonic(), 0))
          except Closed:
            drop(connection)
          except UserError as error:
            connection.send(error=str(error))
            raise
    except UserError as error:
      for peer in came.values():
        peer.connection.send(error=str(error))
      raise
    for connection in strangers:
      connection.close()
  peers = [came[index] for index in sorted(came)]
  for peer in peers:
    peer.connection.send(go=me)
  return peers


def _greeted(message: dict[str, Any], connection: Connection) -> Peer | None:
  """Who says hello; who says something else is a stranger."""
  match message:
    case {'gptjax': dict(), 'process': int(index), 'processes': int(), 'host': str(host)}:
      return Peer(index, host[:100], connection)
  raise Closed('something else')


def _compare(group: Group, facts: Mapping[str, str], peer: Peer, message: dict[str, Any], same: Peer | None, me: str) -> None:
  """Raises a UserError where a process is not one of this run."""
  if message['processes'] != group.processes:
    raise UserError('--processes', message['processes'], f'{group.processes}, as process 0 on {me} has it; the other is of {peer}')
  if same or not 0 < peer.index < group.processes:
    other = str(same) if same else f'process 0 on {me}'
    raise UserError('--process', peer.index, f'a number for each process; {peer} came, and {other} was there before')
  theirs = message['gptjax']
  for name in sorted({*facts, *theirs}):
    if theirs.get(name) != facts.get(name):
      raise UserError(name, theirs.get(name), f'{facts.get(name)!r}, as process 0 on {me} has it; the other is of {peer}')


def _go(group: Group, facts: Mapping[str, str], timeout: float, deadline: float) -> Peer:
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
        connection.send(gptjax=dict(facts), process=group.process, processes=group.processes, host=socket.gethostname())
        return _released(connection, deadline)
      except Closed as error:
        reason = str(error)
      except BaseException:
        connection.close()
        raise
      connection.close()
    time.sleep(min(0.25, max(deadline - time.monotonic(), 0)))
  raise UserError('--coordinator', group.coordinator, f'the address of process 0; process {group.process} did not meet it there within '
                  f'{timeout:g} s: {reason}')


def _released(connection: Connection, deadline: float) -> Peer:
  """Waits until process 0, once reached, says what becomes of all: it may have started later, and then waits longer than we would."""
  while (left := deadline - time.monotonic()) > 0:
    if select.select([connection], [], [], left)[0]:
      for message in connection.receive():
        match message:
          case {'wait': int() | float() as seconds}:
            deadline = time.monotonic() + seconds + 5
          case {'error': str(text)}:
            raise UserError.told(text)
          case {'go': str(host)}:
            return Peer(0, host, connection)
          case _:
            raise Closed('something else answers there')
  raise Closed('it does not answer')
