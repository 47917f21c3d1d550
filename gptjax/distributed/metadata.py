"""Requests to the metadata server of a cloud's machine."""

import urllib.request

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The server answers its own machine alone, so no proxy of the environment is used."""


def request(url: str, timeout: float, method: str = 'GET', **headers: str) -> tuple[str, str | None]:
  """Returns the text of an answer and its ETag; headers are given with underscores for hyphens, and the timeout in seconds.

  Raises:
    urllib.error.HTTPError: a status of 400 or more.
    OSError: no answer.
  """
  request = urllib.request.Request(url, method=method, headers={name.replace('_', '-'): value for name, value in headers.items()})
  with _DIRECT.open(request, timeout=timeout) as answer:
    return answer.read().decode(), answer.headers.get('ETag')
