"""The embedded corpus is what the library's modules are, through a TFDS dataset that does not need TensorFlow."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from gptjax.config import UserError
from gptjax.data.documents import TextFiles
from gptjax.data.stdlib_corpus import stdlib_documents, stdlib_sources


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


def test_only_modules_that_people_wrote_are_in_it(library):
  names = [document.name for document in stdlib_sources(library)]
  assert names == sorted(names)
  modules = {f'{package}/{path.name}' for package in ('json', 'asyncio') for path in (library / package).glob('*.py')}
  assert set(names) == {*modules, 'crlf.py'}
  assert {'json/decoder.py', 'asyncio/base_events.py'} <= modules


def test_the_running_library_is_a_corpus():
  sources = stdlib_sources()
  assert len(sources) > 300
  assert {'argparse.py', 'json/decoder.py'} <= set(sources.files)
  assert sum(path.stat().st_size for path in sources.files.values()) > 5e6
  assert not any('test' in Path(name).parts for name in sources.files)


def test_a_python_without_sources_is_an_error(tmp_path):
  with pytest.raises(UserError, match=rf'^data.files: .*no sources .*{tmp_path}'):
    stdlib_sources(tmp_path)


def test_the_dataset_gives_the_sources_back(library, tmp_path, capfd):
  sources = stdlib_sources(library)
  documents = stdlib_documents(sources, tmp_path)
  assert documents == list(sources)
  assert 'tensorflow' not in sys.modules
  out, err = capfd.readouterr()
  assert out == ''
  assert len(err.splitlines()) == 1
  version = '.'.join(map(str, sys.version_info[:3]))
  records = list((tmp_path / 'tfds').glob(f'*/python_stdlib/{version}/*.array_record-*'))
  assert len(records) == 1
  before = records[0].stat().st_mtime_ns
  assert stdlib_documents(sources, tmp_path) == documents
  assert records[0].stat().st_mtime_ns == before
  assert capfd.readouterr() == ('', '')


def test_other_sources_are_another_dataset(library, tmp_path):
  stdlib_documents(stdlib_sources(library), tmp_path)
  (library / 'crlf.py').write_text('y = 2\n')
  documents = {document.name: document.text for document in stdlib_documents(stdlib_sources(library), tmp_path)}
  assert documents['crlf.py'] == 'y = 2\n'


def test_a_build_that_dies_leaves_nothing_that_is_trusted(library, tmp_path):
  class Killed(TextFiles):

    def __getitem__(self, index):
      if index == 20:
        raise KeyboardInterrupt
      return super().__getitem__(index)

    def sha256(self):
      return TextFiles(self.files).sha256()

  sources = stdlib_sources(library)
  with pytest.raises(KeyboardInterrupt):
    stdlib_documents(Killed(sources.files), tmp_path)
  assert stdlib_documents(sources, tmp_path) == list(sources)


def test_the_room_imports_neither_tfds_nor_jax():
  code = "import sys, gptjax.data; print({'tensorflow_datasets', 'tensorflow', 'jax', 'flax'} & set(sys.modules))"
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'set()\n'
