"""Files are read as they are, mistakes are named, and a document stays on its side of the split."""

import pytest
from hypothesis import given, settings, strategies as st

from gptjax.config import UserError
from gptjax.data import Document, read_files, split_documents


@pytest.fixture
def folder(tmp_path):
  for name, text in {'b.txt': 'B', 'a.md': 'A', 'sub/c.txt': 'C', 'sub/deep/d.txt': 'D', 'e.bin': 'E', 'sub/f.c': 'F',
                     '.hidden.txt': 'H', 'empty.txt': ''}.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return tmp_path


@pytest.mark.parametrize(('pattern', 'names'), [
    ('b.txt', ['b.txt']), ('e.bin', ['e.bin']), ('', ['a.md', 'b.txt', 'sub/c.txt', 'sub/deep/d.txt']),
    ('*.txt', ['b.txt']), ('sub/*', ['c.txt', 'f.c']), ('**/*.txt', ['b.txt', 'sub/c.txt', 'sub/deep/d.txt']),
    ('s*/c.txt', ['sub/c.txt']), ('sub/**/?.txt', ['c.txt', 'deep/d.txt']),
])
def test_a_path_a_folder_or_a_glob(folder, pattern, names):
  assert [document.name for document in read_files(str(folder / pattern))] == names


def test_names_with_wildcards_are_names_first(tmp_path):
  (tmp_path / 'a[1].txt').write_text('x')
  (tmp_path / 'b[2]').mkdir()
  (tmp_path / 'b[2]/c.txt').write_text('y')
  assert [d.text for d in read_files(str(tmp_path / 'a[1].txt'))] == ['x']
  assert [d.text for d in read_files(str(tmp_path / 'b[2]'))] == ['y']


def test_bytes_become_text_one_to_one(tmp_path):
  raw = '\ufeffa\r\nb\rc\n\0\x1c\u2028é'.encode()
  (tmp_path / 'a.txt').write_bytes(raw)
  assert read_files(str(tmp_path / 'a.txt'))[0].text.encode() == raw


def test_a_missing_file_names_one_that_is_near(folder):
  with pytest.raises(UserError, match=r"^data.files: '.*/b.tx', accepted: a file, a folder or .*did you mean .*/b.txt"):
    read_files(str(folder / 'b.tx'))
  with pytest.raises(UserError, match=r'^data.files: '):
    read_files(str(folder / 'nowhere/b.txt'))


def test_a_folder_without_text_files_asks_for_a_glob(tmp_path):
  (tmp_path / 'a.c').write_text('x')
  with pytest.raises(UserError, match=r'^data.files: .*\.txt.*glob'):
    read_files(str(tmp_path))


def test_files_without_text_are_no_documents(folder):
  with pytest.raises(UserError, match=r'^data.files: .*not empty'):
    read_files(str(folder / 'empty.txt'))


def test_text_that_is_not_utf8_is_named_with_file_and_byte(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'caf\xc3\xa9 caf\xe9 au lait')
  files = read_files(str(tmp_path))
  for read in (lambda: files[0], files.sha256):
    with pytest.raises(UserError, match=r'a\.txt, byte 9: .*UTF-8'):
      read()


def test_the_digest_tells_names_and_texts_apart(tmp_path):
  def digest(**files):
    for path in tmp_path.iterdir():
      path.unlink()
    for name, text in files.items():
      (tmp_path / f'{name}.txt').write_text(text)
    return read_files(str(tmp_path)).sha256()

  digests = [digest(a='x', b='y'), digest(a='y', b='x'), digest(a='xy'), digest(a='x', c='y'), digest(a='x', b='z')]
  assert len(set(digests)) == len(digests)
  assert digest(b='y', a='x') == digests[0]


def test_a_single_document_is_split_where_nanogpt_splits_it():
  train, valid = split_documents([Document('input.txt', 'x' * 1_003_854 + 'y' * 111_540)], 0.1)
  assert [d.text for d in train] == ['x' * 1_003_854]
  assert [d.text for d in valid] == ['y' * 111_540]


@given(length=st.integers(10, 5000), tenths=st.integers(1, 9))
@settings(max_examples=200, deadline=None, database=None)
def test_the_share_of_a_single_document_is_exact(length, tenths):
  (train,), (valid,) = split_documents([Document('a', 'x' * length)], tenths / 10)
  assert len(train.text) == length * (10 - tenths) // 10
  assert len(train.text) + len(valid.text) == length


def test_a_document_too_short_to_split_is_an_error():
  with pytest.raises(UserError, match=r'^data.valid_fraction: 0.1, accepted: .*the 1 characters of a\.txt'):
    split_documents([Document('a.txt', 'x')], 0.1)


def sides(names, fraction):
  return [[document.name for document in side] for side in split_documents([Document(n, n) for n in names], fraction)]


@given(names=st.lists(st.text(min_size=1), min_size=2, unique=True), fraction=st.floats(0.001, 0.999))
@settings(max_examples=200, deadline=None, database=None)
def test_documents_are_shared_out_and_neither_side_is_empty(names, fraction):
  train, valid = sides(names, fraction)
  assert sorted(train + valid) == sorted(names)
  assert train
  assert valid
  assert [name for name in names if name in train] == train


def test_more_documents_move_none_and_the_share_is_about_right():
  names = [f'{i}.txt' for i in range(1000)]
  train, valid = sides(names[:500], 0.2)
  more_train, more_valid = sides(names[::-1], 0.2)
  assert set(train) <= set(more_train)
  assert set(valid) <= set(more_valid)
  assert 160 < len(more_valid) < 240
