"""Requests to the metadata server of a cloud's machine."""

import urllib.request

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""The server answers its own machine alone, so no proxy of the environment is used."""


def request(url: str, timeout: float, method: str = 'GET', **headers: str) -> tuple[str, str | None]:
  """Returns the text of an answer and its ETag.

  Args:
    url: of the server.
    timeout: seconds.
    method: of HTTP.
    headers: with underscores for hyphens.

  Raises:
    urllib.error.HTTPError: a status of 400 or more.
    OSError: no answer.
  """
  asked = urllib.request.Request(url, method=method, headers={name.replace('_', '-'): value for name, value in headers.items()})
  with _DIRECT.open(asked, timeout=timeout) as answer:
    return answer.read().decode(), answer.headers.get('ETag')
