"""The safetensors format: tensors are read as they were written, and damage is an error with the file's name."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax.config import UserError
from gptjax.interop.matching import bits
from gptjax.interop.tensor_files import DTYPES, INDEX, Entry, Writer, read_header, read_tensors

VALUES = {
  'b': np.arange(6, dtype=np.float32).reshape(2, 3), 'a': np.array([1, math.nan, -0.0], ml_dtypes.bfloat16),
  'odd': np.arange(5, dtype=np.uint8), 'scalar': np.array(3, np.float16), 'empty': np.zeros((0, 4), np.float32),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def entries_of(values):
  return {name: Entry(NAMES[value.dtype], value.shape) for name, value in values.items()}


@pytest.fixture
def file(tmp_path):
  write(tmp_path, VALUES)
  return tmp_path / 'model.safetensors'


def write(folder, values, shard_bytes=10**6):
  writer = Writer(folder, entries_of(values), shard_bytes)
  for name in reversed(values):  # in any order
    writer.write(name, values[name])
  writer.finish()


def assert_same(entries, values):
  assert entries.keys() == values.keys()
  for name, value in values.items():
    view = entries[name].view()
    assert view.dtype == value.dtype and view.shape == value.shape and np.array_equal(bits(view), bits(value)), name


def test_tensors_are_read_as_written(file):
  entries = read_header(file)
  assert_same(entries, VALUES)
  assert all(entry.start % DTYPES[entry.dtype].itemsize == 0 for entry in entries.values())


def test_the_reader_and_writer_of_the_safetensors_package_agree(file, tmp_path):
  theirs = load_file(file)
  assert all(np.array_equal(bits(theirs[name]), bits(value)) for name, value in VALUES.items())
  save_file(VALUES, tmp_path / 'theirs', {'format': 'pt'})
  assert_same(read_header(tmp_path / 'theirs'), VALUES)


def rewritten(path, change):
  """Rewrites the header of a file; the bytes of tensors stay."""
  content = path.read_bytes()
  length = int.from_bytes(content[:8], 'little')
  text = change(json.loads(content[8:8 + length]))
  text = text if isinstance(text, bytes) else json.dumps(text).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + content[8 + length:])


@pytest.mark.parametrize('change', [
  lambda header: {**header, 'b': header['b'] | {'data_offsets': [4, 28]}},
  lambda header: {**header, 'b': header['b'] | {'data_offsets': [24, 0]}},
  lambda header: {**header, 'b': header['b'] | {'data_offsets': [-24, 0]}},
  lambda header: {**header, 'b': header['b'] | {'shape': [2, 4]}},
  lambda header: {**header, 'b': header['b'] | {'shape': [2.0, 3]}},
  lambda header: {**header, 'b': header['b'] | {'shape': 6}},
  lambda header: {**header, 'b': header['b'] | {'dtype': 'F31'}},
  lambda header: {**header, 'b': header['b'] | {'dtype': 'BF16'}},
  lambda header: {**header, 'b': {'dtype': 'F32', 'shape': [2, 3]}},
  lambda header: {**header, 'b': None},
  lambda header: {**header, 'second': header['b']},
  lambda header: {name: value for name, value in header.items() if name != 'odd'},
  lambda header: [header],
  lambda header: json.dumps(header).encode()[:-1],
  lambda header: json.dumps(header).replace('{', '{"odd": {}, ', 1).encode(),
  lambda header: b'\xff\xfe',
])
def test_a_damaged_header_is_an_error(file, change):
  rewritten(file, change)
  with pytest.raises(UserError, match='model.safetensors.*a complete safetensors file'):
    read_header(file)


@pytest.mark.parametrize('change', [
  lambda content: b'', lambda content: content[:7], lambda content: content[:50], lambda content: content[:-1],
  lambda content: content + b'\0', lambda content: b'\xff' * 8 + content[8:], lambda content: bytes(8) + content[8:]])
def test_an_incomplete_file_is_an_error(file, change):
  file.write_bytes(change(file.read_bytes()))
  with pytest.raises(UserError, match='model.safetensors.*a complete safetensors file'):
    read_header(file)


def test_shards_are_filled_up_to_the_maximum_and_have_an_index(tmp_path):
  values = {f'{i}': np.full((size,), i, np.float32) for i, size in enumerate((10, 10, 5, 30, 1))}
  write(tmp_path, values, 80)
  index = json.loads((tmp_path / INDEX).read_text())
  assert index['metadata']['total_size'] == 4 * 56
  assert [index['weight_map'][name][6:11] for name in values] == ['00001', '00001', '00002', '00003', '00004']
  assert_same(read_tensors(tmp_path), values)


@pytest.mark.parametrize('damage, error', [
  (lambda folder, index: (folder / 'model-00002-of-00002.safetensors').unlink(), 'model-00002-of-00002.safetensors: None'),
  (lambda folder, index: index['weight_map'].pop('b'), "'b', expected: only tensors that"),
  (lambda folder, index: index['weight_map'].update(d=index['weight_map']['a']), 'the tensor d'),
  (lambda folder, index: index['weight_map'].update(a='../model-00001-of-00002.safetensors'), 'a file in this folder'),
  (lambda folder, index: index.pop('weight_map'), 'weight_map')])
def test_an_index_that_does_not_fit_its_shards_is_an_error(tmp_path, damage, error):
  values = {name: np.ones(4, np.float32) for name in 'abc'}
  write(tmp_path, values, 32)
  index = json.loads((tmp_path / INDEX).read_text())
  damage(tmp_path, index)
  (tmp_path / INDEX).write_text(json.dumps(index))
  with pytest.raises(UserError, match=error):
    read_tensors(tmp_path)


def test_pickles_are_never_read(tmp_path):
  (tmp_path / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n')
  with pytest.raises(UserError, match="'pytorch_model.bin', expected: .* only safetensors are read"):
    read_tensors(tmp_path)
