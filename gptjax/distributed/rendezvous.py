"""The rendezvous: all processes of a run connect to process 0 within a stated time, or all end with one line that says who is missing.

When all have joined, process 0 stops listening, and JAX's service takes the port. The connections stay open for `ProcessGroup`.
"""

import contextlib
import ipaddress
import json
import select
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.config import UserError
from gptjax.distributed.discovery import GroupSpec

_MAX_BYTES = 2**16
"""Maximum bytes of a message; a longer one comes from another program."""
_FOREIGN = 'another program answers at this address'
_GRACE = 5.0
"""Seconds for which process 0 tries to listen, and stays after a failure to report it to processes that connect late."""


class Closed(Exception):
  """The other end is gone, or is not a process of a run."""


class Peer:
  """Another process, over a connected socket; messages are JSON objects, one per line. One thread can read many peers, by a selector."""

  def __init__(self, sock: socket.socket, index: int = -1, host: str = ''):
    self.socket, self.index, self.host, self._rest = sock, index, host, b''
    self.unread: list[dict[str, Any]] = []
    """messages that arrived together with one after which another reader takes over"""
    sock.settimeout(10)  # messages are small: a peer that does not take one in this time never will
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that lost power does not close its connections
    for option, seconds in (('TCP_KEEPIDLE', 30), ('TCP_KEEPINTVL', 10), ('TCP_KEEPCNT', 3)):
      if hasattr(socket, option):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

  def __str__(self) -> str:
    return f'process {self.index} on {self.host}'

  def send(self, **message: Any) -> None:
    """Sends one message; errors are ignored, since `receive` will report that the other end is gone."""
    with contextlib.suppress(OSError):
      self.socket.sendall(json.dumps(message).encode() + b'\n')

  def receive(self) -> list[dict[str, Any]]:
    """Reads once and returns the complete messages, or raises Closed; blocks only where no data has arrived."""
    try:
      data = self.socket.recv(_MAX_BYTES)
    except OSError as error:
      raise Closed(error.strerror or str(error)) from None
    if not data:
      raise Closed('it closed the connection')
    *lines, self._rest = (self._rest + data).split(b'\n')
    try:
      messages = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
      raise Closed(_FOREIGN) from None
    if len(self._rest) > _MAX_BYTES or not all(isinstance(message, dict) for message in messages):
      raise Closed(_FOREIGN)
    return messages


def meet(group: GroupSpec, facts: Mapping[str, str], timeout: float) -> list[Peer]:
  """Waits until all processes of a group of two or more have joined; returns the others in process 0, and elsewhere process 0.

  Raises a UserError, the same in every process that joined, if one does not join within `timeout` seconds, or its `facts` differ.
  """
  deadline = time.monotonic() + timeout
  return _accept_all(group, facts, timeout, deadline) if group.index == 0 else [_connect(group, facts, timeout, deadline)]


def address(group: GroupSpec) -> tuple[str, int]:
  """Host and port of the coordinator."""
  assert group.coordinator
  host, _, port = group.coordinator.rpartition(':')
  return host.strip('[]'), int(port)


def bind_address(group: GroupSpec) -> str:
  """The interface that process 0 listens on: loopback where the coordinator's address is, else '' for all."""
  host = '127.0.0.1' if address(group)[0] == 'localhost' else address(group)[0]
  with contextlib.suppress(ValueError):
    if ipaddress.ip_address(host).is_loopback:
      return host
  return ''


def _listen(group: GroupSpec, deadline: float) -> socket.socket:
  host, port = bind_address(group), address(group)[1]
  both = not host and socket.has_dualstack_ipv6()
  while True:
    try:
      return socket.create_server((host, port), family=socket.AF_INET6 if both or ':' in host else socket.AF_INET,
                                  dualstack_ipv6=both, backlog=1024)
    except OSError as error:
      if time.monotonic() > deadline:
        raise UserError('--coordinator', group.coordinator, f'a port that is free on this host; {error.strerror or error}') from None
      time.sleep(0.25)  # the program that holds it, such as the previous start of this run, may be about to end


def _accept_all(group: GroupSpec, facts: Mapping[str, str], timeout: float, deadline: float) -> list[Peer]:
  """Process 0's side of the rendezvous."""
  others, late = group.count - 1, lambda: min(deadline, time.monotonic() + _GRACE)
  with _listen(group, late()) as listener, selectors.DefaultSelector() as selector:
    server = _Server(group, facts, listener, selector)
    server.serve(deadline, lambda: server.error is not None or len(server.joined) == others)
    peers = sorted(server.joined, key=lambda peer: peer.index)
    if not server.error and len(peers) < others:
      missing = [f'process {index}' for index in sorted({*range(1, group.count)} - {peer.index for peer in peers})]
      more = f' and {len(missing) - 20} more' if len(missing) > 20 else ''
      server.fail(UserError.from_text(
        f'peers: {len(peers) + 1} of {group.count} joined within {timeout:g} s, missing: {", ".join(missing[:20])}{more}, expected: all '
        f'{group.count} within --rendezvous_timeout; joined: {", ".join([f"process 0 on {socket.gethostname()}", *map(str, peers)])}'))
    if server.error:
      server.serve(late(), lambda: len(server.joined) == others)
      raise server.error
    for other in {key.data for key in selector.get_map().values()} - {None, *peers}:
      other.socket.close()
  for peer in peers:
    peer.send(start=socket.gethostname())
  return peers


class _Server:
  """Accepts connections, and checks that they are from processes of this run."""

  def __init__(self, group: GroupSpec, facts: Mapping[str, str], listener: socket.socket, selector: selectors.BaseSelector):
    self._group, self._facts, self._listener, self._selector = group, facts, listener, selector
    self.joined: set[Peer] = set()
    """processes that joined, or after an error have received it"""
    self.error: UserError | None = None
    selector.register(listener, selectors.EVENT_READ)

  def serve(self, deadline: float, done: Callable[[], bool]) -> None:
    """Handles connections and messages until `done`, or the deadline."""
    while not done() and (left := deadline - time.monotonic()) > 0:
      for key, _ in self._selector.select(left):
        if key.data is None:
          with contextlib.suppress(OSError):
            peer = Peer(self._listener.accept()[0])
            self._selector.register(peer.socket, selectors.EVENT_READ, peer)
          continue
        try:
          for message in key.data.receive():
            self._identify(key.data, message)
        except Closed:
          self._selector.unregister(key.fileobj)
          key.data.socket.close()
          if not self.error:
            self.joined.discard(key.data)  # it may join again

  def fail(self, error: UserError) -> None:
    """Sends an error to all that joined; processes that connect later get it too."""
    self.error = error
    for peer in self.joined:
      peer.send(error=str(error))

  def _identify(self, peer: Peer, message: dict[str, Any]) -> None:
    match message:
      case {'gptjax': dict(facts), 'process': int(index), 'processes': int(count), 'host': str(host)}:
        peer.index, peer.host = index, host[:100]
      case _:
        raise Closed('not a process of a run')
    try:
      if not self.error:
        self._compare(peer, facts, count)
    except UserError as error:
      self.fail(error)
    self.joined.add(peer)
    peer.send(**({'error': str(self.error)} if self.error else {'wait': True}))

  def _compare(self, peer: Peer, facts: Mapping[str, Any], count: int) -> None:
    """Raises a UserError where a process does not belong to this run."""
    me, joined = f'process 0 on {socket.gethostname()}', {other.index: other for other in self.joined}
    if count != self._group.count:
      raise UserError('--processes', count, f'{self._group.count}, as {me} has it; the other value is from {peer}')
    if peer.index in joined or not 0 < peer.index < count:
      raise UserError('--process', peer.index, f'a different index for each process; {peer} joined after {joined.get(peer.index, me)}')
    for name in sorted({*self._facts, *facts}):
      if facts.get(name) != self._facts.get(name):
        raise UserError(name, facts.get(name), f'{self._facts.get(name)!r}, as {me} has it; the other value is from {peer}')


def _connect(group: GroupSpec, facts: Mapping[str, str], timeout: float, deadline: float) -> Peer:
  """The other processes' side of the rendezvous."""
  reason = 'no answer'
  while (left := deadline - time.monotonic()) > 0:
    try:
      sock = socket.create_connection(address(group), timeout=min(left, 10))
    except OSError as error:  # process 0 has not started, or its name does not resolve yet
      reason = error.strerror or str(error)
    else:
      peer = Peer(sock, 0)
      try:
        if sock.getsockname() == sock.getpeername():  # TCP can connect to itself where no program listens
          raise Closed('no answer')
        peer.send(gptjax=dict(facts), process=group.index, processes=group.count, host=socket.gethostname())
        _await_start(peer, timeout, deadline)
        return peer
      except Closed as error:
        reason = str(error)
        sock.close()
    time.sleep(min(0.25, max(deadline - time.monotonic(), 0)))
  raise UserError('--coordinator', group.coordinator, f'the address of process 0; process {group.index} did not reach it there within '
                  f'{timeout:g} s: {reason}')


def _await_start(peer: Peer, timeout: float, deadline: float) -> None:
  """Waits for the outcome from process 0; as soon as it answers, for its timeout, since it may have started later."""
  while (left := deadline - time.monotonic()) > 0:
    if select.select([peer.socket], [], [], left)[0]:
      messages = peer.receive()
      while messages:
        match messages.pop(0):
          case {'wait': True}:
            deadline = time.monotonic() + timeout + 5
          case {'error': str(text)}:
            raise UserError.from_text(text)
          case {'start': str(host)}:
            peer.host, peer.unread = host, messages  # process 0 may already have sent more
            return
          case _:
            raise Closed(_FOREIGN)
  raise Closed('no answer')
