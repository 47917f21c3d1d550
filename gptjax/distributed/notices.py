"""Preemption notices: Google Cloud and EC2 announce to a process that asks that they are about to take its machine back."""

import http.client
import json
import os
import threading
import time
import urllib.error
from collections.abc import Callable, Mapping
from pathlib import Path

from gptjax.distributed.metadata import request

_INTERVAL = 5.0
"""Seconds between requests to EC2, as its documentation advises, and after a failed one."""


def watch_notices(on_notice: Callable[[str], None], environment: Mapping[str, str] = os.environ) -> bool:
  """Starts a thread that calls `on_notice` once, with a description, when the machine's cloud announces the end of the machine.

  GCE_METADATA_HOST and AWS_EC2_METADATA_SERVICE_ENDPOINT name a server, as they do for the clouds' own clients. Returns whether this
  machine belongs to one of these clouds.
  """
  vendor_file = Path('/sys/class/dmi/id/sys_vendor')
  vendor = vendor_file.read_text().strip() if vendor_file.exists() else ''
  if host := environment.get('GCE_METADATA_HOST') or ('metadata.google.internal' if vendor == 'Google' else None):
    poll = lambda etag: _google(f'http://{host}', etag)
  elif (url := environment.get('AWS_EC2_METADATA_SERVICE_ENDPOINT')) or vendor == 'Amazon EC2':
    poll = lambda etag: _ec2((url or 'http://169.254.169.254').rstrip('/'))
  else:
    return False
  threading.Thread(target=_watch, args=(poll, on_notice), name='preemption notices', daemon=True).start()
  return True


def _watch(poll: Callable[[str | None], tuple[str | None, str | None]], on_notice: Callable[[str], None]) -> None:
  notice, etag = None, None
  while not notice:
    try:
      notice, etag = poll(etag)
    except (OSError, ValueError, http.client.HTTPException):  # the server may be unavailable for a moment
      time.sleep(_INTERVAL)
  on_notice(notice)


def _google(server: str, etag: str | None) -> tuple[str | None, str | None]:
  """Waits for a change: cloud.google.com/compute/docs/metadata/querying-metadata, 'waiting for updates'."""
  query = f'?recursive=true&wait_for_change=true&timeout_sec=60&last_etag={etag or 0}'
  text, etag = request(f'{server}/computeMetadata/v1/instance/{query}', 90, Metadata_Flavor='Google')
  instance = json.loads(text)
  if not isinstance(instance, dict):
    raise ValueError('the metadata server returned no instance')
  if instance.get('preempted') == 'TRUE':
    return 'Google Cloud preempts the machine', etag
  # Machines with accelerators are not migrated for maintenance: they are terminated.
  if instance.get('maintenanceEvent', 'NONE') == 'TERMINATE_ON_HOST_MAINTENANCE':
    return 'Google Cloud terminates the machine for maintenance', etag
  return None, etag


def _ec2(server: str) -> tuple[str | None, None]:
  """Requests a spot instance's notice: docs.aws.amazon.com, 'spot instance interruption notices'."""
  token, _ = request(f'{server}/latest/api/token', 10, 'PUT', X_aws_ec2_metadata_token_ttl_seconds='60')
  try:
    action = json.loads(request(f'{server}/latest/meta-data/spot/instance-action', 10, X_aws_ec2_metadata_token=token)[0])
  except urllib.error.HTTPError as error:
    if error.code != 404:
      raise
    time.sleep(_INTERVAL)
    return None, None
  if not isinstance(action, dict):
    raise ValueError('the metadata server returned no action')
  return f'EC2 will {action.get("action")} the machine at {action.get("time")}', None
