"""An object store reads like a local folder, tested with an S3 server."""

import importlib
import os
import pickle
import socket
import subprocess
import sys

import pytest
import zstandard
from object_store import s3_server

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources import open_source
from gptjax.data.sources.source import Source
from gptjax.data.sources.text import TextFiles

pq = pytest.importorskip('pyarrow.parquet')
pa = pytest.importorskip('pyarrow')
LINES = ''.join(f'{{"text": "dócument {i}"}}\n\n' for i in range(200)).encode()


@pytest.fixture(scope='module')
def bucket(tmp_path_factory):
  """The files of a bucket, by their names, and the folder with the same files."""
  folder = tmp_path_factory.mktemp('bucket')
  pq.write_table(pa.table({'text': [f'row {i}' for i in range(500)], 'x': ['x'] * 500}), folder / 't.parquet', row_group_size=100)
  files = {'text/a.txt': 'é\n\nb\n\n\nc'.encode() * 50, 'text/deep/b.txt': b'b', 'text/.hidden/c.txt': b'c', 'text/e.txt': b'',
           'lines/a.jsonl': LINES, 'packed/a.jsonl.zst': zstandard.compress(LINES),
           'tables/t.parquet': (folder / 't.parquet').read_bytes()}
  with s3_server() as store:
    store.mkdir('bucket')
    for name, data in files.items():
      store.pipe(f'bucket/data/{name}', data)
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(data)
    yield folder


@pytest.mark.full
@pytest.mark.parametrize(('pattern', 'config'), [
    ('text', {}), ('text', {'separator': r'\n\n'}), ('text/a.txt', {}), ('text/*.txt', {}), ('text/**/*.txt', {}), ('lines', {}),
    ('packed/a.jsonl.zst', {}), ('*/*.jsonl*', {}), ('tables', {}), ('tables/t.parquet', {}),
])
def test_a_bucket_yields_the_same_documents_as_a_folder(bucket, pattern, config, monkeypatch):
  monkeypatch.setattr(Source, 'part_bytes', 3000)
  monkeypatch.setattr(TextFiles, 'max_document_bytes', 100)
  here = open_source(SourceConfig(path=f'{bucket}/{pattern}', **config))
  there = open_source(SourceConfig(path=f's3://bucket/data/{pattern}', **config))
  copy = pickle.loads(pickle.dumps(there))
  for part, other in zip(here.parts(), there.parts(), strict=True):
    assert list(here.read(part)) == list(copy.read(other))
    assert other.file.startswith('s3://bucket/data/')
  assert (here.description, here.size) == (there.description, there.size)
  assert len(list(there)) > 1


@pytest.mark.full
def test_only_a_part_of_an_object_is_fetched(bucket, monkeypatch):
  import s3fs
  fetched, real = [], s3fs.core._fetch_range

  def fetch(*args, **kwargs):
    data = real(*args, **kwargs)
    fetched.append(len(data))
    return data

  monkeypatch.setattr(s3fs.core, '_fetch_range', fetch)
  monkeypatch.setattr(Source, 'part_bytes', 500)
  monkeypatch.setattr('gptjax.data.sources.text._WINDOW', 50)
  source = open_source(SourceConfig(path='s3://bucket/data/lines'))
  assert not fetched
  assert list(source.read(list(source.parts())[3]))
  assert 400 < sum(fetched) < 800


@pytest.mark.full
@pytest.mark.parametrize(('path', 'error'), [
    ('s3://bucket/data/text/a.tx', r'a file, a folder or a glob .*did you mean s3://bucket/data/text/a.txt\?'),
    ('s3://bucket/data/text/*.rst', 'a glob that matches files'), ('s3://other/a.txt', 'a file, a folder'),
    ('s3://bucket/data/text/e.txt', 'not empty'),
])
def test_errors_name_missing_datasets_and_objects(bucket, path, error):
  with pytest.raises(UserError, match=f'^data.source.path: .*{error}'):
    open_source(SourceConfig(path=path))


@pytest.mark.full
def test_the_fingerprint_changes_with_the_object(bucket):
  import s3fs
  config = SourceConfig(path='s3://bucket/data/lines/a.jsonl')
  before = open_source(config).fingerprint()
  assert open_source(config).fingerprint() == before
  s3fs.S3FileSystem().pipe('bucket/data/lines/a.jsonl', LINES[::-1])
  assert open_source(config).fingerprint() != before
  s3fs.S3FileSystem().pipe('bucket/data/lines/a.jsonl', LINES)


def test_the_error_names_a_missing_client(monkeypatch):
  monkeypatch.setitem(sys.modules, 's3fs', None)
  monkeypatch.delitem(importlib.import_module('fsspec.registry')._registry, 's3', raising=False)
  with pytest.raises(UserError, match=r'^data.source.path: .s3://a/b.*s3fs package: pip install s3fs'):
    open_source(SourceConfig(path='s3://a/b'))


GOOGLE = '''
import gzip, gcsfs
from gcp_storage_emulator.server import create_server
from gptjax.config import SourceConfig, UserError
from gptjax.data.sources import open_source
server = create_server('127.0.0.1', {port}, in_memory=True, default_bucket='bucket')
server.start()
store = gcsfs.GCSFileSystem(token='anon')
store.pipe('bucket/a/a.txt', b'first|second|third')
store.pipe('bucket/b/b.jsonl.gz', gzip.compress(b'{{"text": "x"}}\\n' * 3))
source = open_source(SourceConfig(path='gs://bucket/a', separator='|'))
source.step = 4
print([document.text for document in source])
print([document.name for document in open_source(SourceConfig(path='gs://bucket/*/*.jsonl.gz'))])
try:
  open_source(SourceConfig(path='gs://bucket/a/a.tx'))
except UserError as error:
  print(error)
server.stop()
'''


@pytest.mark.full
def test_google_cloud_storage():
  pytest.importorskip('gcp_storage_emulator')
  pytest.importorskip('gcsfs')
  with socket.create_server(('127.0.0.1', 0)) as free:
    port = free.getsockname()[1]
  # Google's client asks a second protocol, which the emulator does not speak, what kind of bucket it is.
  environment = {**os.environ, 'STORAGE_EMULATOR_HOST': f'http://127.0.0.1:{port}', 'FSSPEC_GS_TOKEN': 'anon',
                 'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false'}
  run = subprocess.run([sys.executable, '-c', GOOGLE.format(port=port)], env=environment, capture_output=True, text=True, check=True)
  texts, names, error = run.stdout.splitlines()
  assert texts == "['first', 'second', 'third']"
  assert names == "['b/b.jsonl.gz#0', 'b/b.jsonl.gz#14', 'b/b.jsonl.gz#28']"
  assert error.endswith('did you mean gs://bucket/a/a.txt?')
