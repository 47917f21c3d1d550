"""Parquet files and Hugging Face datasets are read by columns, in parts that are ranges of rows."""

import io
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources import Document, Malformed, open_source, malformed_error
from gptjax.data.sources.source import Source

TABLE = pa.table({'text': [f'text {i}' for i in range(1000)], 'id': list(range(1000)), 'other': ['x' * 100] * 1000,
                  'meta': [{'title': f'T{i}', 'page': i} for i in range(1000)]})


def open_table(path, **config):
  return open_source(SourceConfig(path=str(path), **config))


def texts(source):
  """The texts, from parts that a copy reads in the opposite order, after the names were checked."""
  parts = list(source.parts())
  copy = pickle.loads(pickle.dumps(source))
  read = {part: list(copy.read(part)) for part in reversed(parts)}
  records = [record for part in parts for record in read[part]]
  assert [record.name.partition('#')[2] for record in records] == [str(i) for i in range(len(records))]
  assert sum(part.size for part in parts) == source.size
  return [record.text for record in records]


@pytest.mark.parametrize(('rows', 'part_bytes', 'least', 'limit'), [
    (1000, 100, 8, 8), (1000, 2**23, 1, 1), (300, 1000, 14, 30), (7, 100, 143, 1000), (7, 1000, 10, 40), (7, 2**23, 1, 1),
])
def test_parts_are_several_row_groups_or_pieces_of_one(tmp_path, monkeypatch, rows, part_bytes, least, limit):
  pq.write_table(TABLE, tmp_path / 'a.parquet', row_group_size=rows, compression='none')
  monkeypatch.setattr(Source, 'part_bytes', part_bytes)
  source = open_table(tmp_path)
  assert texts(source) == TABLE['text'].to_pylist()
  starts = [part.start for part in source.parts()]
  assert least <= len(starts) <= limit
  if limit < 1000 // rows:  # groups that fit are not cut
    assert all(start % rows == 0 for start in starts)


def test_fields_of_several_columns_and_of_objects(tmp_path):
  pq.write_table(TABLE, tmp_path / 'a.parquet')
  assert texts(open_table(tmp_path, text='{id}: {meta.title}')) == [f'{i}: T{i}' for i in range(1000)]


def test_a_column_may_have_a_dot_in_its_name(tmp_path, saved):
  import datasets
  table = pa.table({'a.b': ['x', 'y'], 'a': [{'c': 'z', 'b.c': 'u'}] * 2})
  pq.write_table(table, tmp_path / 'a.parquet')
  datasets.Dataset(table).save_to_disk(tmp_path / 'saved')
  for path in (tmp_path / 'a.parquet', f'hf:{tmp_path}/saved'):
    assert texts(open_table(path, text='a.b')) == ['x', 'y']
    assert texts(open_table(path, text='{a.b}{a.c}{a.b.c}')) == ['xzu', 'yzu']


def test_only_the_needed_columns_are_read(tmp_path, monkeypatch):
  data = os.urandom(3_000_000).hex()
  pq.write_table(pa.table({'text': ['x'] * 10, 'other': [data[i::10] for i in range(10)]}), tmp_path / 'a.parquet')
  read, real = [], io.open

  class Watched(io.FileIO):
    def read(self, size=-1):
      data = super().read(size)
      read.append(len(data))
      return data

  monkeypatch.setattr('builtins.open', lambda path, *args: Watched(path) if str(path).endswith('t') else real(path, *args))
  assert len(texts(open_table(tmp_path))) == 10
  assert 0 < sum(read) < 1_000_000


def test_rows_without_text_are_malformed(tmp_path):
  column = pa.array([b'fine', None, b'caf\xe9', b''], pa.binary())
  table = pa.table({'text': pa.Array.from_buffers(pa.string(), 4, column.buffers())})
  pq.write_table(table, tmp_path / 'a.parquet')
  source = open_table(tmp_path)
  (part,) = source.parts()
  first, second, third, last = source.read(part)
  assert (first, last) == (Document('a.parquet#0', 'fine'), None)
  assert [str(malformed_error(source, part, record, 0)) for record in (second, third)] == [
      f"{tmp_path}/a.parquet, record 2: 'None', expected: text in the field text",
      f"{tmp_path}/a.parquet, record 3: b'\\xe9', expected: UTF-8 text in the field text"]


def test_errors_name_a_missing_column_and_a_broken_file(tmp_path):
  pq.write_table(TABLE, tmp_path / 'a.parquet')
  with pytest.raises(UserError, match=r"^data.source.text: 'txt', .*a\.parquet: text, id, .*did you mean text\?"):
    list(open_table(tmp_path, text='txt'))
  undamaged = (tmp_path / 'a.parquet').read_bytes()
  for data in (undamaged[:-100], b'no Parquet', undamaged[:100] + bytes(2000) + undamaged[2100:]):
    (tmp_path / 'a.parquet').write_bytes(data)
    with pytest.raises(UserError, match=r'^data.source.path: .*a\.parquet.*an undamaged Parquet file'):
      list(open_table(tmp_path))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  os.environ['HF_DATASETS_DISABLE_PROGRESS_BARS'] = '1'
  datasets = pytest.importorskip('datasets')
  folder = tmp_path_factory.mktemp('hf')
  dataset = datasets.Dataset(TABLE)
  dataset.save_to_disk(folder / 'one')
  datasets.DatasetDict({'train': dataset, 'test': dataset.select(range(5))}).save_to_disk(folder / 'several')
  return folder


def test_a_saved_hugging_face_dataset(saved, monkeypatch):
  monkeypatch.setattr(Source, 'part_bytes', 1000)
  source = open_table(f'hf:{saved}/one')
  assert texts(source) == TABLE['text'].to_pylist()
  assert len(list(source.parts())) > 5
  assert len(pickle.dumps(source)) < 5000
  assert source.description == 'hf:one, split train'
  assert texts(open_table(f'hf:{saved}/several', split='test', text='{id} {meta.title}')) == [f'{i} T{i}' for i in range(5)]
  prints = {open_table(f'hf:{saved}/several', split=split).fingerprint() for split in ('test', 'train', 'train')}
  assert len(prints) == 2


@pytest.mark.parametrize(('name', 'config', 'error'), [
    ('several', {'split': 'tset'}, r"^data.source.split: 'tset', .*train, test; did you mean test\?"),
    ('one', {'text': 'txt'}, r"^data.source.text: 'txt', .*text, id, other, meta; did you mean text\?"),
    ('', {}, r'^data.source.path: .hf:.*neither'),
])
def test_errors_name_a_missing_split_or_column(saved, name, config, error):
  with pytest.raises(UserError, match=error):
    open_table(f'hf:{saved}/{name}', **config)


def test_a_hub_that_cannot_be_reached_is_an_error(saved, monkeypatch):
  monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  with pytest.raises(UserError, match=r"^data.source.path: 'hf:nobody/nothing', .*loaded here"):
    open_table('hf:nobody/nothing')


def test_malformed_rows_are_counted(saved):
  source = open_table(f'hf:{saved}/one', text='id')
  (part,) = source.parts()
  records = list(source.read(part))
  assert len(records) == 1000
  assert all(isinstance(record, Malformed) for record in records)
