"""What a cloud says before it takes a machine back: Google Cloud and EC2 tell it to a process that asks."""

import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

_EVERY = 5.0
"""Seconds between questions to EC2, as its documentation advises, and after an answer that failed."""


def watch_notices(heard: Callable[[str], None], environment: Mapping[str, str] = os.environ) -> bool:
  """Asks the cloud that this machine is of, from a thread, and calls `heard` once with what it says.

  Args:
    heard: gets a few words for people.
    environment: GCE_METADATA_HOST and AWS_EC2_METADATA_SERVICE_ENDPOINT name a server, as they do for the clouds' own clients.

  Returns:
    Whether this is a machine of a cloud that is asked.
  """
  maker = _maker()
  if host := environment.get('GCE_METADATA_HOST') or ('metadata.google.internal' if maker == 'Google' else None):
    ask = lambda seen: _google(f'http://{host}', seen)
  elif (url := environment.get('AWS_EC2_METADATA_SERVICE_ENDPOINT')) or maker == 'Amazon EC2':
    ask = lambda seen: _ec2((url or 'http://169.254.169.254').rstrip('/'), seen)
  else:
    return False
  threading.Thread(target=_watch, args=(ask, heard), name='cloud notices', daemon=True).start()
  return True


def _maker() -> str:
  file = Path('/sys/class/dmi/id/sys_vendor')
  return file.read_text().strip() if file.exists() else ''


def _watch(ask: Callable[[str | None], tuple[str | None, str | None]], heard: Callable[[str], None]) -> None:
  seen = None
  while True:
    try:
      notice, seen = ask(seen)
    except (OSError, ValueError, http.client.HTTPException):  # it may be away for a moment
      time.sleep(_EVERY)
      continue
    if notice:
      heard(notice)
      return


def _google(server: str, seen: str | None) -> tuple[str | None, str | None]:
  """Waits for a change: cloud.google.com/compute/docs/metadata/querying-metadata, 'waiting for updates'."""
  query = f'?recursive=true&wait_for_change=true&timeout_sec=60&last_etag={seen or 0}'
  request = urllib.request.Request(f'{server}/computeMetadata/v1/instance/{query}', headers={'Metadata-Flavor': 'Google'})
  with urllib.request.urlopen(request, timeout=90) as answer:
    instance, seen = json.load(answer), answer.headers.get('ETag')
  if not isinstance(instance, dict):
    raise ValueError('no instance')
  if instance.get('preempted') == 'TRUE':
    return 'Google Cloud takes the machine back', seen
  # Machines with accelerators are not moved elsewhere for maintenance: they end.
  if instance.get('maintenanceEvent', 'NONE') == 'TERMINATE_ON_HOST_MAINTENANCE':
    return 'Google Cloud ends the machine for maintenance', seen
  return None, seen


def _ec2(server: str, seen: str | None) -> tuple[str | None, str | None]:
  """Asks for a spot instance's notice: docs.aws.amazon.com, 'spot instance interruption notices'; `seen` is a session's token."""
  del seen
  request = urllib.request.Request(f'{server}/latest/api/token', method='PUT', headers={'X-aws-ec2-metadata-token-ttl-seconds': '60'})
  with urllib.request.urlopen(request, timeout=10) as answer:
    token = answer.read().decode()
  request = urllib.request.Request(f'{server}/latest/meta-data/spot/instance-action', headers={'X-aws-ec2-metadata-token': token})
  try:
    with urllib.request.urlopen(request, timeout=10) as answer:
      action = json.load(answer)
  except urllib.error.HTTPError as error:
    if error.code != 404:
      raise
    time.sleep(_EVERY)
    return None, None
  if not isinstance(action, dict):
    raise ValueError('no action')
  return f'EC2 will {action.get("action")} the machine at {action.get("time")}', None
