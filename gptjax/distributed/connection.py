"""One connection between two processes of a run: messages are JSON objects, a line each."""

import contextlib
import json
import socket
import time
from typing import Any

_LONGEST = 2**16
"""Bytes of a message; more than that comes from something else."""


class Closed(Exception):
  """The other end is gone, or is none of ours."""


class Connection:
  """A socket that is read when something is there, so that one thread can serve many.

  Args:
    sock: connected.
  """

  def __init__(self, sock: socket.socket):
    self.socket, self._rest, self.since = sock, b'', time.monotonic()
    self.unread: list[dict[str, Any]] = []
    """messages that were received together with one after which another reader takes over"""
    sock.settimeout(10)  # what we send is small: who does not take it in this time never will
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host without power says nothing
    for option, seconds in (('TCP_KEEPIDLE', 30), ('TCP_KEEPINTVL', 10), ('TCP_KEEPCNT', 3)):
      if hasattr(socket, option):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)

  def fileno(self) -> int:
    """For select."""
    return self.socket.fileno()

  def send(self, **message: Any) -> None:
    """Sends one message; to an end that is gone, nothing: reading will tell."""
    with contextlib.suppress(OSError):
      self.socket.sendall(json.dumps(message).encode() + b'\n')

  def receive(self) -> list[dict[str, Any]]:
    """The messages that have come; reads once, so it waits only where nothing is there.

    Raises:
      Closed: no more will come, or it is nothing that a process of a run would send.
    """
    try:
      data = self.socket.recv(_LONGEST)
    except OSError as error:
      raise Closed(error.strerror or str(error)) from None
    *lines, self._rest = (self._rest + data).split(b'\n')
    if not data or len(self._rest) > _LONGEST:
      raise Closed('it closed the connection' if not data else 'something else answers there')
    try:
      messages = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
      messages = [None]
    if not all(isinstance(message, dict) for message in messages):
      raise Closed('something else answers there')
    return messages

  def close(self) -> None:
    """Ends it."""
    self.socket.close()
