"""GPT-2's ids equal those of the `tokenizers` library for any text, and damaged or inconsistent files are rejected."""

import json
import pickle
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from gptjax.config import UserError
from gptjax.data.tokenizers import Gpt2Tokenizer, load_tokenizer

TEXT = '''It's the reader's choice: they'll read 1,234 pages, or we've read them all by 2024 -- isn't that so?
  The lines that are indented,    and the words that stand apart;\tthen a tab, and déjà vu, naïve, 日本語 日本, Привет.\r\n
def main(argv=None):\n    return [x for x in argv if x == '--help']\n''' * 3
ODD = [
  '\n', '\n\n', '  ', '   ', '\t', "'s", "'ll", "'S", '’s', "''", '日本', 'é', 'e\u0301', '\x1c', '\x1f', '\x85', '\u3000', '\xa0',
  '<|endoftext|>', '½', '²', '٣', '१२', '😀', '👩\u200d👧', '\ufeff', '\0', 'a' * 30, 'the', ' The', '123', '!!!', '_', 'ß', 'İ',
  '\u2028', '\U0010ffff', 'Ġ', 'Ċ']
TEXTS = st.lists(st.text() | st.sampled_from(ODD)).map(''.join)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A small vocabulary in the form of GPT-2's: its files, its first 256 ids, its separator as the last id."""
  folder = tmp_path_factory.mktemp('gpt2')
  trained = tokenizers.ByteLevelBPETokenizer()
  trained.train_from_iterator([TEXT], vocab_size=700, min_frequency=2, show_progress=False)
  trained.save_model(str(folder))
  ids = json.loads((folder / 'vocab.json').read_text('utf-8'))
  (folder / 'encoder.json').write_text(json.dumps({**ids, '<|endoftext|>': len(ids)}))
  (folder / 'merges.txt').rename(folder / 'vocab.bpe')
  (folder / 'vocab.json').unlink()
  return folder


@pytest.fixture(scope='module')
def ours(folder):
  return load_tokenizer(folder)


@pytest.fixture(scope='module')
def reference(folder):
  return tokenizers.ByteLevelBPETokenizer(str(folder / 'encoder.json'), str(folder / 'vocab.bpe'))


@given(text=TEXTS)
@settings(max_examples=200, deadline=None, database=None)
def test_ids_equal_those_of_the_tokenizers_package(ours, reference, text):
  ids = ours.encode(text)
  assert ids.dtype == np.int32
  assert ids.tolist() == reference.encode(text).ids
  assert ours.decode(ids) == text


@given(text=st.text(alphabet=TEXT))
@settings(max_examples=200, deadline=None, database=None)
def test_ids_of_training_like_text_equal_those_of_the_tokenizers_package(ours, reference, text):
  assert ours.encode(text).tolist() == reference.encode(text).ids


def test_ids_of_the_training_text_equal_those_of_the_tokenizers_package(ours, reference):
  ids = ours.encode(TEXT)
  assert ids.tolist() == reference.encode(TEXT).ids
  assert len(ids) < len(TEXT) / 2


def test_the_separator_is_the_last_id_and_never_text(ours):
  assert ours.bos_id == ours.eos_id == ours.pad_id == ours.vocab_size - 1
  assert ours.unk_id is None
  assert ours.pieces[ours.bos_id] == b''
  ids = ours.encode('a<|endoftext|>b')
  assert ours.bos_id not in ids
  assert ours.decode([ours.bos_id, *ids, ours.eos_id]) == 'a<|endoftext|>b'


@pytest.mark.parametrize('unit', [' ', '\n', '\t ', '\u3000', '\x85'])
@pytest.mark.parametrize('around', ['{}', 'a{}', '{}b', 'a{}b{}\x1c{} c'])
def test_long_white_space_has_the_ids_of_the_reference(ours, reference, unit, around):
  text = around.replace('{}', unit * 70_000)
  assert ours.encode(text).tolist() == reference.encode(text).ids


@pytest.mark.parametrize('text', [
  'a' * 10**6, 'ab ' * 10**5, ' ' * 10**6, ' ' * 2 * 10**6 + 'b', '\n' * 2 * 10**6 + 'b', '!' * 10**6, '日' * 10**6, "'" * 10**6])
def test_text_without_spaces_or_words_is_encoded_quickly(ours, text):
  assert ours.decode(ours.encode(text)) == text


def test_the_error_for_a_lone_surrogate_has_its_position(ours):
  with pytest.raises(UserError, match=r"^--prompt, character 1: '\\ud800'"):
    ours.encode('a\ud800', '--prompt')


def test_a_saved_tokenizer_loads_unchanged(ours, folder, tmp_path):
  ours.save(tmp_path / 'new')
  assert json.loads((tmp_path / 'new/gptjax_tokenizer.json').read_text()) == {'kind': 'gpt2'}
  for name in ('encoder.json', 'vocab.bpe'):
    assert (tmp_path / 'new' / name).read_bytes() == (folder / name).read_bytes()
  loaded = load_tokenizer(tmp_path / 'new')
  assert loaded.sha256 == ours.sha256 == pickle.loads(pickle.dumps(ours)).sha256
  assert loaded.encode(TEXT).tolist() == ours.encode(TEXT).tolist()


def copy(folder, tmp_path, **changed):
  for name in ('encoder.json', 'vocab.bpe'):
    content = (folder / name).read_bytes()
    (tmp_path / name).write_bytes(changed.get(name.partition('.')[0], lambda old: old)(content))
  return tmp_path


@pytest.mark.parametrize(('name', 'change', 'message'), [
  ('encoder', lambda old: old[:-5], r"encoder.json: '.*', expected: JSON"),
  ('encoder', lambda old: b'[1]', r"encoder.json: '\[1\]', expected: a JSON object"),
  ('encoder', lambda old: old.replace(b'"!": 0', b'"!": 1'), r"encoder.json: '!': 1, expected: 0, the id that the merges imply"),
  ('encoder', lambda old: old.replace(b'"!": 0, ', b''), r"encoder.json: '!': None, expected: 0"),
  ('encoder', lambda old: old.replace(b'"!": 0', b'"!": 0, "new": 9999'), r"encoder.json: 'new': 9999, expected: None"),
  ('encoder', lambda old: old.replace(b'<|endoftext|>', b'<|end|>'), r"encoder.json: '<\|endoftext\|>': None, expected: \d+"),
  ('encoder', lambda old: b'\xff', r"encoder.json, byte 0: b'\\xff', expected: UTF-8"),
  ('vocab', lambda old: old.rstrip(b'\n').rpartition(b'\n')[0], r'encoder.json: .*, expected: \d+, the id that the merges imply'),
  ('vocab', lambda old: old.rstrip(b'\n') + b'\nabc\n', r"vocab.bpe:\d+: 'abc', expected: two tokens"),
  ('vocab', lambda old: old.replace(b'\n', b'\r\n'), r"vocab.bpe:2: .*, expected: two tokens"),
  ('vocab', lambda old: b'', r'encoder.json: ')])
def test_errors_name_damaged_or_inconsistent_files(folder, tmp_path, name, change, message):
  with pytest.raises(UserError, match=message):
    load_tokenizer(copy(folder, tmp_path, **{name: change}))


def test_the_error_names_a_missing_file(folder, tmp_path):
  copy(folder, tmp_path)
  (tmp_path / 'vocab.bpe').unlink()
  with pytest.raises(UserError, match=r"vocab.bpe', expected: GPT-2's vocab.bpe \(No such file"):
    load_tokenizer(tmp_path)
  with pytest.raises(UserError, match=r"encoder.json', expected: GPT-2's encoder.json"):
    Gpt2Tokenizer(tmp_path / 'nowhere')


def test_the_error_without_tiktoken_names_the_package(folder, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tiktoken', None)
  with pytest.raises(UserError, match=r'pip install tiktoken$'):
    load_tokenizer(folder)
