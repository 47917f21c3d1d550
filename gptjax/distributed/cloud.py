"""The metadata servers of Google Cloud and EC2: attributes of a TPU VM, and notices that the cloud is about to take a machine back."""

import http.client
import importlib.util
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from gptjax.config import UserError

_INTERVAL = 5.0
"""Seconds between requests to EC2, as its documentation advises, and after a failed one."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A server answers only its own machine, so no proxy of the environment is used."""


def vm_attribute(name: str) -> str | None:
  """Returns an attribute of this TPU VM; None on other machines, or if there is none."""
  chips = any(Path('/dev').glob('accel[0-9]*')) or any(Path('/dev/vfio').glob('[0-9]*'))
  if not chips or importlib.util.find_spec('libtpu') is None:
    return None
  host = os.environ.get('GCE_METADATA_IP', 'metadata.google.internal')
  try:
    return _request(f'http://{host}/computeMetadata/v1/instance/attributes/{name}', 10, Metadata_Flavor='Google')[0]
  except urllib.error.HTTPError as error:
    if error.code == 404:
      return None
    raise UserError('--cluster', 'tpu', f'--cluster=none, or a metadata server with {name}; its status is {error.code}') from None
  except OSError:
    return None


def watch_notices(on_notice: Callable[[str], None], environment: Mapping[str, str] = os.environ) -> bool:
  """Starts a thread that calls `on_notice` once, with a description, when the cloud announces the end of this machine.

  GCE_METADATA_HOST and AWS_EC2_METADATA_SERVICE_ENDPOINT name a server, as for the clouds' own clients. Returns whether there is one.
  """
  vendor_file = Path('/sys/class/dmi/id/sys_vendor')
  vendor = vendor_file.read_text().strip() if vendor_file.exists() else ''
  poll: Callable[[str | None], tuple[str | None, str | None]]
  if host := environment.get('GCE_METADATA_HOST') or ('metadata.google.internal' if vendor == 'Google' else None):
    poll = lambda etag: _google(f'http://{host}', etag)
  elif (url := environment.get('AWS_EC2_METADATA_SERVICE_ENDPOINT')) or vendor == 'Amazon EC2':
    poll = lambda etag: _ec2((url or 'http://169.254.169.254').rstrip('/'))
  else:
    return False

  def watch() -> None:
    notice, etag = None, None
    while not notice:
      try:
        notice, etag = poll(etag)
      except (OSError, ValueError, http.client.HTTPException):  # the server may be unavailable for a moment
        time.sleep(_INTERVAL)
    on_notice(notice)

  threading.Thread(target=watch, name='preemption notices', daemon=True).start()
  return True


def _google(server: str, etag: str | None) -> tuple[str | None, str | None]:
  """Waits for a change: cloud.google.com/compute/docs/metadata/querying-metadata, 'waiting for updates'."""
  query = f'?recursive=true&wait_for_change=true&timeout_sec=60&last_etag={etag or 0}'
  text, etag = _request(f'{server}/computeMetadata/v1/instance/{query}', 90, Metadata_Flavor='Google')
  match json.loads(text):
    case {'preempted': 'TRUE'}:
      return 'Google Cloud preempts the machine', etag
    # Machines with accelerators are not migrated for maintenance: they are terminated.
    case {'maintenanceEvent': 'TERMINATE_ON_HOST_MAINTENANCE'}:
      return 'Google Cloud terminates the machine for maintenance', etag
    case dict():
      return None, etag
  raise ValueError('the metadata server returned no instance')


def _ec2(server: str) -> tuple[str | None, None]:
  """Requests a spot instance's notice: docs.aws.amazon.com, 'spot instance interruption notices'."""
  token, _ = _request(f'{server}/latest/api/token', 10, 'PUT', X_aws_ec2_metadata_token_ttl_seconds='60')
  try:
    text, _ = _request(f'{server}/latest/meta-data/spot/instance-action', 10, X_aws_ec2_metadata_token=token)
  except urllib.error.HTTPError as error:
    if error.code != 404:
      raise
    time.sleep(_INTERVAL)
    return None, None
  match json.loads(text):
    case dict(notice):
      return f'EC2 will {notice.get("action")} the machine at {notice.get("time")}', None
  raise ValueError('the metadata server returned no action')


def _request(url: str, timeout: float, method: str = 'GET', **headers: str) -> tuple[str, str | None]:
  """Returns the text of an answer and its ETag; headers are given with underscores for hyphens, and the timeout in seconds."""
  request = urllib.request.Request(url, method=method, headers={name.replace('_', '-'): value for name, value in headers.items()})
  with _DIRECT.open(request, timeout=timeout) as answer:
    return answer.read().decode(), answer.headers.get('ETag')
