"""The embedded corpus is the library's modules, in a TFDS dataset that does not need TensorFlow."""

import pickle
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources import open_source
from gptjax.data.sources.opening import Stdlib, stdlib_modules


@pytest.fixture
def library(tmp_path):
  """A library of two real packages and of all that is left out."""
  root = tmp_path / 'lib'
  for package in ('json', 'asyncio'):
    shutil.copytree(Path(sysconfig.get_path('stdlib'), package), root / package)
  for name in ('test/test_a.py', 'json/tests/a.py', 'idlelib/idle_test/a.py', 'site-packages/a.py', 'encodings/cp1.py',
               'pydoc_data/topics.py', 'config-3-x86/a.py', '_sysconfigdata_x.py', 'html/entities.py', 'notes.txt'):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text('x = 1\n')
  (root / 'empty.py').touch()
  (root / 'latin.py').write_bytes(b'# coding: latin-1\nx = "\xe9"\n')
  (root / 'crlf.py').write_bytes('x = "é▁"\r\n'.encode())
  return root


def test_only_modules_written_by_people_are_included(library):
  names = [document.name for document in stdlib_modules(library)]
  assert names == sorted(names)
  modules = {f'{package}/{path.name}' for package in ('json', 'asyncio') for path in (library / package).glob('*.py')}
  assert set(names) == {*modules, 'crlf.py'}
  assert {'json/decoder.py', 'asyncio/base_events.py'} <= modules


def test_the_running_library_is_a_corpus(tmp_path):
  source = open_source(SourceConfig(), tmp_path)
  assert len(source.document_bytes) > 300
  assert {'argparse.py', 'json/decoder.py'} <= set(source.document_bytes)
  assert source.size > 5e6
  assert not any('test' in Path(name).parts for name in source.document_bytes)
  assert not list(tmp_path.iterdir())
  assert source.fingerprint() == open_source(SourceConfig(), tmp_path).fingerprint()


def test_a_python_without_sources_is_an_error(tmp_path):
  with pytest.raises(UserError, match=rf'^data.source.path: .*no sources .*{tmp_path}'):
    Stdlib(tmp_path, tmp_path)


def test_the_dataset_gives_the_sources_back(library, tmp_path, capfd):
  source = pickle.loads(pickle.dumps(Stdlib(tmp_path, library)))
  documents = list(source)
  assert documents == stdlib_modules(library)
  assert [document.name for document in documents] == list(source.document_bytes)
  assert 'tensorflow' not in sys.modules
  out, err = capfd.readouterr()
  assert out == ''
  assert len(err.splitlines()) == 1
  version = '.'.join(map(str, sys.version_info[:3]))
  records = list((tmp_path / 'tfds').glob(f'*/python_stdlib/{version}/*.array_record-*'))
  assert len(records) == 1
  before = records[0].stat().st_mtime_ns
  assert list(Stdlib(tmp_path, library)) == documents
  assert records[0].stat().st_mtime_ns == before
  assert capfd.readouterr() == ('', '')


def test_other_sources_are_another_dataset(library, tmp_path):
  before = Stdlib(tmp_path, library)
  list(before)
  (library / 'crlf.py').write_text('y = 2\n')
  after = Stdlib(tmp_path, library)
  assert after.fingerprint() != before.fingerprint()
  assert {document.name: document.text for document in after}['crlf.py'] == 'y = 2\n'


def test_a_build_that_dies_leaves_nothing_that_is_trusted(library, tmp_path, monkeypatch):
  done = []

  def killed(work, amount):
    done.append(amount)
    if len(done) == 20:
      raise KeyboardInterrupt

  source = Stdlib(tmp_path, library)
  with monkeypatch.context() as patch:
    from gptjax.data.sources import tfds_source
    patch.setattr(tfds_source.ProgressBar, 'advance', killed)
    with pytest.raises(KeyboardInterrupt):
      list(source)
  assert list(source) == stdlib_modules(library)


def test_the_package_imports_nothing_optional():
  optional = {'tensorflow_datasets', 'tensorflow', 'jax', 'flax', 'pyarrow', 'datasets', 'fsspec', 's3fs', 'zstandard'}
  code = f'import sys, gptjax.data.sources; print({optional} & set(sys.modules))'
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'set()\n'
