"""A TFDS dataset is opened by name, folder or builder class, and TFDS prints nothing on stdout."""

import os
import pickle
import subprocess
import sys

import pytest

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources import open_source
from gptjax.data.sources.source import Source

BUILDER = '''
import numpy as np
import tensorflow_datasets as tfds

class GardenPoems(tfds.core.GeneratorBasedBuilder):
  """Poems."""
  VERSION = tfds.core.Version('1.2.0')

  def _info(self):
    features = {'text': tfds.features.Text(), 'page': tfds.features.Scalar(np.int64), 'meta': {'title': tfds.features.Text()},
                'said': tfds.features.Sequence({'role': tfds.features.Text(), 'content': tfds.features.Text()})}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(50), 'test': self._generate_examples(3)}

  def _generate_examples(self, count):
    for i in range(count):
      yield i, {'text': f'poem {i} é', 'page': i, 'meta': {'title': f'T{i}'},
                'said': [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': 'é!'}]}

class Failing(GardenPoems):
  """Fails."""

  def _generate_examples(self, count):
    raise RuntimeError('no ink')

class Remote(GardenPoems):
  """Comes from a server that does not answer."""

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(dl_manager.download('http://localhost:9/poems'))}
'''

RUN = '''
import sys
from gptjax.config import SourceConfig
from gptjax.data.sources import open_source
source = open_source(SourceConfig(path='tfds:poetry.garden:GardenPoems'))
assert 'tensorflow' not in sys.modules
print(sorted(document.text for document in source)[:2])
'''


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Working directory of somebody with a builder in a package, and the dataset that it prepared under data/."""
  root = tmp_path_factory.mktemp('tfds')
  (root / 'poetry').mkdir()
  (root / 'poetry/garden.py').write_text(BUILDER)
  (root / 'poetry/__init__.py').touch()
  environment = {**os.environ, 'TFDS_DATA_DIR': str(root / 'data'), 'PYTHONPATH': os.path.abspath('.')}
  run = subprocess.run([sys.executable, '-P', '-c', RUN], env=environment, cwd=root, capture_output=True, text=True, check=True)
  assert run.stdout == "['poem 0 é', 'poem 1 é']\n"
  assert run.stderr.splitlines()[-1] == f'preparing garden_poems/1.2.0 in {root}/data/garden_poems/1.2.0'
  return root


@pytest.fixture
def at(folder, monkeypatch):
  """A function that opens a dataset as somebody in that folder does."""
  monkeypatch.setattr('tensorflow_datasets.core.constants.DATA_DIR', str(folder / 'data'))
  monkeypatch.chdir(folder)
  monkeypatch.setattr(sys, 'path', list(sys.path))
  return lambda path, **config: open_source(SourceConfig(path=f'tfds:{path}', **config))


@pytest.mark.parametrize('path', [
    'garden_poems', 'garden_poems:1.2.0', 'data/garden_poems/1.2.0', 'poetry.garden:GardenPoems'])
def test_a_prepared_dataset_is_read_by_all_its_names(at, path, monkeypatch, capfd):
  complete = {document.name: document.text for document in at(path)}
  assert sorted(complete.values()) == sorted(f'poem {i} é' for i in range(50))
  assert list(complete) == [f'train#{i}' for i in range(50)]
  monkeypatch.setattr(Source, 'part_bytes', 200)
  source = at(path)
  parts = list(source.parts())
  assert len(parts) > 10
  assert sum(part.size for part in parts) == source.size
  list(source)
  copy = pickle.loads(pickle.dumps(source))
  assert {document.name: document.text for part in reversed(parts) for document in copy.read(part)} == complete
  assert source.description == 'tfds:garden_poems/1.2.0, split train'
  assert capfd.readouterr() == ('', '')


def test_splits_slices_and_templates(at):
  assert sorted(d.text for d in at('garden_poems', split='test', text='{page}: {meta.title}')) == ['0: T0', '1: T1', '2: T2']
  assert len(list(at('garden_poems', split='train[:20%]+test'))) == 13
  assert len({at('garden_poems', split=split).fingerprint() for split in ('train', 'test', 'train[:50%]', 'test')}) == 3


@pytest.mark.parametrize(('path', 'config', 'error'), [
    ('garden_poems', {'split': 'tset'}, r"^data.source.split: 'tset', .*train, test; did you mean test\?"),
    ('garden_poems', {'text': 'txt'}, r"^data.source.text: 'txt', .*text, .*did you mean text\?"),
    ('ag_news_subse', {}, r'^data.source.path: .tfds:ag_news_subse., .*did you mean tfds:ag_news_subset\?'),
    ('data', {}, r'^data.source.path: .*prepared'),
    ('poetry.gardn:GardenPoems', {}, r'^data.source.path: .*poetry.gardn:GardenPoems.*a module in the working directory'),
    ('poetry.garden:GardenPoem', {}, r'^data.source.path: .*did you mean GardenPoems\?'),
    ('poetry.garden:Failing', {}, r'^data.source.path: .*prepare here .*no ink'),
])
def test_errors_name_missing_datasets_and_objects(at, path, config, error):
  with pytest.raises(UserError, match=error):
    at(path, **config)


def test_a_server_that_cannot_be_reached_is_an_error_within_seconds(at, monkeypatch):
  waits = []
  monkeypatch.setattr('urllib3.util.retry.time.sleep', waits.append)  # between attempts
  with pytest.raises(UserError, match=r'^data.source.path: .*ConnectionError: .*port=9'):
    at('poetry.garden:Remote')
  assert sum(waits) < 5


def test_a_dataset_in_another_format_is_refused(at, folder, tmp_path):
  prepared = folder / 'data/garden_poems/1.2.0'
  for file in prepared.iterdir():
    data = file.read_bytes()
    (tmp_path / file.name).write_bytes(data.replace(b'array_record', b'tfrecord') if file.suffix == '.json' else data)
  with pytest.raises(UserError, match=r'^data.source.path: .*prepared as array_record.*TFRECORD'):
    at(tmp_path)


def test_messages_are_lists_per_key(at):
  found = list(at('garden_poems', split='test', messages='said', chat='plain'))
  assert sorted([turn.content for turn in one.turns] for one in found) == [[f'{i}?', 'é!'] for i in range(3)]
