"""A connection between two processes of a run. Messages are JSON objects, one per line."""

import contextlib
import json
import socket
from typing import Any

_MAX_BYTES = 2**16
"""Of a message; a longer one comes from another program."""
_FOREIGN = 'another program answers at this address'


class Closed(Exception):
  """The other end is gone, or is not a process of a run."""


class Connection:
  """A connected socket that is read when `select` reports data, so that one thread can serve many."""

  def __init__(self, sock: socket.socket):
    self.socket, self._rest = sock, b''
    self.unread: list[dict[str, Any]] = []
    """messages that arrived together with one after which another reader takes over"""
    sock.settimeout(10)  # messages are small: a peer that does not take one in this time never will
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that lost power does not close its connections
    for option, seconds in (('TCP_KEEPIDLE', 30), ('TCP_KEEPINTVL', 10), ('TCP_KEEPCNT', 3)):
      if hasattr(socket, option):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

  def fileno(self) -> int:
    """File descriptor, for `select`."""
    return self.socket.fileno()

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

  def close(self) -> None:
    """Closes the socket."""
    self.socket.close()
