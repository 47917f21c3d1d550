"""A server that speaks S3, on loopback, for tests of what reads object storage."""

import contextlib
import logging

import pytest


@contextlib.contextmanager
def s3_server():
  """Gives a client of a new server, which the environment names while the body runs; skips without the packages."""
  moto, s3fs = pytest.importorskip('moto.server'), pytest.importorskip('s3fs')
  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  server = moto.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  server.start()
  with pytest.MonkeyPatch.context() as patch:
    host, port = server.get_host_and_port()
    for name, value in {'AWS_ENDPOINT_URL': f'http://{host}:{port}', 'AWS_ACCESS_KEY_ID': 'key', 'AWS_SECRET_ACCESS_KEY': 'secret',
                        'AWS_DEFAULT_REGION': 'us-east-1'}.items():
      patch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # they remember the servers of other tests
    yield s3fs.S3FileSystem()
  server.stop()
