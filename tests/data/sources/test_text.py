"""Text files are read unchanged, and cutting them into parts never loses, splits or repeats a document."""

import gzip
import re
import sys

import pytest
import zstandard
from hypothesis import given, settings, strategies as st

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources import Document, Malformed, documents, open_source, malformed_error
from gptjax.data.sources.files import Stream
from gptjax.data.sources.text import RecordFiles, TextFiles

PACKERS = {'': bytes, '.gz': gzip.compress, '.zst': zstandard.ZstdCompressor().compress}


PNG = b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR'
PACKERS_OF_FILES = {f'{name}{ending}': pack for name in ('a.txt', 'a.jsonl') for ending, pack in PACKERS.items()}


def open_text(path, **config):
  return open_source(SourceConfig(path=str(path), **config))


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
def test_a_path_a_folder_or_a_glob(folder, pattern, names, monkeypatch):
  for source in (open_text(folder / pattern), open_text(f'file://{folder}/{pattern}')):
    assert [document.name for document in source] == names
    assert list(source.document_bytes) == names
    assert source.size == sum(part.size for part in source.parts()) == len(names)
  monkeypatch.chdir(folder)
  assert [document.name for document in open_text(pattern or '.')] == names
  assert open_text(pattern or '.').description == open_text(folder / pattern).description


def test_names_with_wildcards_are_names_first(tmp_path):
  (tmp_path / 'a[1].txt').write_text('x')
  (tmp_path / 'b[2]').mkdir()
  (tmp_path / 'b[2]/c.txt').write_text('y')
  assert [d.text for d in open_text(tmp_path / 'a[1].txt')] == ['x']
  assert [d.text for d in open_text(tmp_path / 'b[2]')] == ['y']


def test_bytes_become_text_one_to_one(tmp_path):
  raw = 'a\r\nb\rc\n\x1c\u2028é\u200b'.encode()
  (tmp_path / 'a.txt').write_bytes(raw)
  assert next(iter(open_text(tmp_path / 'a.txt'))).text.encode() == raw


@pytest.mark.parametrize('scheme', ['', 'file://'])
def test_the_error_for_a_missing_file_suggests_the_nearest_name(folder, scheme):
  with pytest.raises(UserError, match=r"^data.source.path: '.*/b.tx', expected: a file, a folder or .*did you mean .*/b.txt"):
    open_text(f'{scheme}{folder}/b.tx')
  with pytest.raises(UserError, match=r'^data.source.path: '):
    open_text(f'{scheme}{folder}/nowhere/b.txt')


@pytest.mark.parametrize('scheme', ['', 'file://'])
def test_a_folder_without_text_files_is_an_error_that_suggests_a_glob(tmp_path, scheme):
  (tmp_path / 'a.c').write_text('x')
  with pytest.raises(UserError, match=r'^data.source.path: .*\.txt.*glob'):
    open_text(f'{scheme}{tmp_path}')


def test_files_without_text_are_no_documents(folder):
  with pytest.raises(UserError, match=r'^data.source.path: .*not empty'):
    open_text(folder / 'empty.txt')


def test_a_url_of_an_unknown_scheme_is_an_error():
  with pytest.raises(UserError, match=r'^data.source.path: .nope://a/b'):
    open_text('nope://a/b')


def test_a_deleted_file_is_an_error(folder):
  source = open_text(folder / 'b.txt')
  (folder / 'b.txt').unlink()
  with pytest.raises(UserError, match=r'^data.source.path: .*b\.txt.*No such file'):
    list(source)


@pytest.mark.parametrize('separator', ['', ' '])
def test_the_error_for_invalid_utf8_has_file_and_byte(tmp_path, separator):
  (tmp_path / 'a.txt').write_bytes(b'caf\xc3\xa9 caf\xe9 au lait')
  source = open_text(tmp_path, separator=separator)
  (part,) = source.parts()
  (malformed,) = (record for record in source.read(part) if isinstance(record, Malformed))
  assert str(malformed_error(source, part, malformed, 7)) == (
      f"{tmp_path}/a.txt, byte 9: {malformed.value!r}, expected: UTF-8 text")
  assert malformed.value == b'\xe9 au'[:len(malformed.value)]


def naive(name, text, separator):
  """The documents from splitting the complete text at once."""
  offset, found = 0, []
  for piece in text.split(separator):
    if piece.strip():
      found.append(Document(f'{name}#{offset}', piece))
    offset += len(f'{piece}{separator}'.encode())
  return found


def parts_apart(source):
  """The documents, from parts that are read in the opposite order."""
  parts = list(source.parts())
  assert list(source.parts()) == parts
  return [record for read in reversed([list(source.read(part)) for part in reversed(parts)]) for record in read if record]


@given(text=st.one_of(st.text('a\n', min_size=1, max_size=30), st.text('ab\n é\u3000', min_size=1, max_size=60)),
       separator=st.sampled_from(['\n', '\n\n', '\n\n\n', 'aa', 'aba', 'é', 'a\n']), step=st.integers(1, 20))
@settings(max_examples=300, deadline=None, database=None)
def test_parts_are_cut_at_the_separators_of_the_complete_text(tmp_path_factory, text, separator, step):
  for ending, pack in PACKERS.items():
    path = tmp_path_factory.getbasetemp() / f'cut.txt{ending}'
    path.write_bytes(pack(text.encode()))
    source = open_text(path, separator=separator.replace('\n', '\\n'))
    source.step = step
    assert parts_apart(source) == list(source) == naive(path.name, text, separator)
    assert sum(part.size for part in source.parts()) <= source.size


def naive_lines(text, step):
  """The text, cut at the first place behind each multiple of the step where a line ends and no white space follows."""
  cuts, offset, least = [0], 0, step
  for i, (char, following) in enumerate(zip(text, text[1:])):
    offset += len(char.encode())
    if offset >= least and char == '\n' and not following.isspace():
      cuts.append(i + 1)
      least = (offset // step + 1) * step
  return [text[cut:end] for cut, end in zip(cuts, [*cuts[1:], len(text)])]


@given(text=st.lists(st.sampled_from(['\n', 'a\n', 'é\nb', ' ', '\r\n', '\u3000', '\x85']), min_size=1, max_size=30).map(''.join),
       step=st.integers(1, 30), window=st.integers(1, 20))
@settings(max_examples=300, deadline=None, database=None)
def test_a_large_file_is_cut_at_line_ends_that_no_white_space_follows(tmp_path_factory, text, step, window):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('gptjax.data.sources.text._WINDOW', window)
    patch.setattr(TextFiles, 'max_document_bytes', step)
    for ending, pack in PACKERS.items():
      path = tmp_path_factory.getbasetemp() / f'complete.txt{ending}'
      path.write_bytes(pack(text.encode()))
      source = open_text(path)
      found = parts_apart(source)
      assert found == list(source)
      assert ''.join(document.text for document in found) == text
      assert len({document.name for document in found}) == len(found)
      assert [document.text for document in found] == naive_lines(text, step)


def test_the_description_says_that_large_files_are_cut(tmp_path, monkeypatch):
  monkeypatch.setattr(TextFiles, 'max_document_bytes', 2**20)
  (tmp_path / 'a.txt').write_text('line\n' * 10)
  assert open_text(tmp_path).description == tmp_path.name
  (tmp_path / 'b.txt').write_text('line\n' * 2**18)
  source = open_text(tmp_path)
  assert source.description == f'{tmp_path.name} (2 text files), files above 1 MB cut at line ends'
  assert [(d.name, len(d.text)) for d in source] == [('a.txt', 50), ('b.txt', 2**20 + 4), ('b.txt#1048580', 2**18 - 4)]


def test_a_compressed_file_is_never_completely_in_memory(tmp_path, monkeypatch):
  packer = zstandard.ZstdCompressor()
  members = [packer.compress(f'{i} {"x" * 2000}\n'.encode() * 50) for i in range(100)]  # 10 MB
  (tmp_path / 'a.txt.zst').write_bytes(b''.join(members))
  monkeypatch.setattr('gptjax.data.sources.files._CHUNK', 100)
  monkeypatch.setattr(RecordFiles, 'part_bytes', 300_000)
  largest = [0]
  read = Stream.read

  def watched(self, start, stop):
    data = read(self, start, stop)
    largest[0] = max(largest[0], len(self._data))
    return data

  monkeypatch.setattr(Stream, 'read', watched)
  assert sum(1 for _ in open_text(tmp_path, separator='\\n')) == 5000
  assert largest[0] < 1_000_000


@pytest.mark.parametrize(('name', 'data'), [
    ('a.txt.gz', gzip.compress(b'hello' * 1000)[:-9]), ('a.txt.zst', zstandard.compress(bytes(range(256)) * 1000)[:200]),
    ('a.txt.gz', b'no gzip'), ('a.txt.zst', b'no zstandard'),
], ids=['cut gzip', 'cut zstandard', 'no gzip', 'no zstandard'])  # gzip's header has the time, and workers must name a test alike
def test_the_error_names_a_broken_compressed_file(tmp_path, name, data):
  (tmp_path / name).write_bytes(data)
  with pytest.raises(UserError, match=rf'^data.source.path: .*{name}.*(ends early|broken)'):
    list(open_text(tmp_path / name))


def test_the_error_names_a_missing_package(tmp_path, monkeypatch):
  (tmp_path / 'a.txt.zst').write_bytes(zstandard.compress(b'x'))
  monkeypatch.setitem(sys.modules, 'zstandard', None)
  with pytest.raises(UserError, match=r'^data.source.path: .*a\.txt\.zst.*zstandard package: pip install zstandard'):
    list(open_text(tmp_path))


def test_the_fingerprint_changes_with_files_and_with_how_they_are_read(tmp_path):
  (tmp_path / 'a.txt').write_text('x')
  before = open_text(tmp_path)
  assert open_text(tmp_path).fingerprint() == before.fingerprint()
  prints = [before.fingerprint(), open_text(tmp_path, separator='x').fingerprint()]
  (tmp_path / 'a.txt').write_text('xy')
  prints.append(open_text(tmp_path).fingerprint())
  (tmp_path / 'a.txt').rename(tmp_path / 'b.txt')
  prints.append(open_text(tmp_path).fingerprint())
  assert len(set(prints)) == 4


def test_one_format_is_read_and_the_description_names_the_others(tmp_path):
  for name, text in {'README.md': 'about', 'a.jsonl': '{"text": "A"}', 'info.json': '{'}.items():
    (tmp_path / name).write_text(text)
  source = open_text(tmp_path)
  assert [document.text for document in source] == ['A']
  assert source.description == f'{tmp_path.name} (1 JSON lines file; 1 text file ignored; 1 JSON file ignored)'
  with pytest.raises(UserError, match=r'^data.source.separator: .*a record is a document'):
    open_text(tmp_path, separator='x')
  (tmp_path / 'b.parquet').write_text('x')
  with pytest.raises(UserError, match=r'^data.source.path: .*one format.*1 JSON lines file.*1 Parquet file'):
    open_text(tmp_path)


@pytest.mark.parametrize('scheme', ['', 'file://'])
def test_endings_count_in_any_case_and_the_description_counts_what_is_ignored(tmp_path, scheme):
  def written(folder, *names):
    (tmp_path / folder).mkdir()
    for name in names:
      data = b'{"text": "x"}\n' if 'json' in name.lower() or 'nd' in name.lower() else b'x'
      packer = next((pack for ending, pack in PACKERS.items() if ending and name.lower().endswith(ending)), bytes)
      (tmp_path / folder / name).write_bytes(packer(data))
    source = open_text(f'{scheme}{tmp_path}/{folder}')
    return [(document.name.partition('#')[0], document.text) for document in source], source.description.partition(', ')[0]

  texts = ['A.TXT', 'B.Md.GZ', 'c.txt.Zst']
  assert written('texts', *texts, 'd.c', 'E.PNG') == ([(name, 'x') for name in texts], 'texts (3 text files; 2 other files ignored)')
  lines = ['P.JSONL', 'Q.NDJSON.GZ', 'r.Jsonl.ZST']
  assert written('lines', *lines, 's.TXT', 't.JSON') == (
    [(name, 'x') for name in lines], 'lines (3 JSON lines files; 1 text file ignored; 1 JSON file ignored)')
  assert [document.text for document in open_text(f'{scheme}{tmp_path}/lines/*.GZ')] == ['x']


@pytest.mark.parametrize('name', PACKERS_OF_FILES)
def test_byte_order_marks_of_files_and_of_files_inside_of_files_are_no_text(tmp_path, name):
  line = '{"text": "zwölf"}\n' if 'json' in name else 'zwölf\n'
  (tmp_path / name).write_bytes(PACKERS_OF_FILES[name](f'\ufeff{line}\ufeff{line}{line}\ufeff'.encode()))
  options = {} if 'json' in name else {'separator': '\n'}
  assert [record.text for record in open_text(tmp_path / name, **options)] == ['zwölf'] * 3
  if not options:
    return
  (document,) = open_text(tmp_path / name)
  assert document.text == line * 3
  (tmp_path / name).write_bytes(PACKERS_OF_FILES[name]('\ufeff'.encode()))
  assert list(open_text(tmp_path / name)) == []


@pytest.mark.parametrize('name', PACKERS_OF_FILES)
@pytest.mark.parametrize(('data', 'expected'), [
    ('\ufeffhällo'.encode('utf-16-le'), 'UTF-16: convert it'), ('\ufeffhällo'.encode('utf-16-be'), 'UTF-16: convert it'),
    ('\ufeffhällo'.encode('utf-32-le'), 'UTF-32: convert it'), (PNG, 'a binary file'), (b'%PDF-1.7\n%\xe2', 'a binary file'),
], ids=['UTF-16 LE', 'UTF-16 BE', 'UTF-32', 'PNG', 'PDF'])
def test_a_file_that_is_no_utf8_text_is_named_as_what_it_is(tmp_path, name, data, expected):
  (tmp_path / name).write_bytes(PACKERS_OF_FILES[name](data))
  with pytest.raises(UserError, match=rf'a\.(txt|jsonl).*: {re.escape(repr(data[:8]))}, expected: UTF-8 text; this is {expected}'):
    list(documents(open_text(tmp_path / name)))


@pytest.mark.parametrize(('name', 'options', 'error'), [
    ('a.csv', {}, r"^data.source.path: '.*a\.csv', expected: JSON lines, Parquet, text, JSON, and no CSV; .*converts it"),
    ('A.TSV.GZ', {}, 'and no CSV'), ('', {}, 'and no CSV'), ('*.csv', {'text': 'b'}, 'and no CSV'),
    ('a.c', {'text': 'b'}, r"^data.source.text: 'b', expected: none for text files"),
    ('a.c', {'split': 'test'}, r"^data.source.split: 'test', expected: none for text files: only tfds: and hf:"),
])
def test_what_cannot_be_meant_is_refused(tmp_path, name, options, error):
  for file in ('a.csv', 'A.TSV.GZ', 'a.c'):
    (tmp_path / file).write_text('a,b\n1,2\n')
  with pytest.raises(UserError, match=error):
    open_text(tmp_path / name, **options)
