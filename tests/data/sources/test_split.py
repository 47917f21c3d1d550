"""A document stays on its side of the split, and the two sides together are the source."""

import dataclasses
import gzip
import pickle

import pytest
from hypothesis import given, settings, strategies as st

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources import Document, Malformed, Part, Source, is_held_out, malformed_error, open_source, split_source
from gptjax.data.sources.text import TextFiles


class Listed(Source):
  """Documents of a list, some to a part."""

  def __init__(self, documents, known=True):
    self.documents = documents
    self.document_bytes = {document.name: len(document.text.encode()) for document in documents} if known else {}
    self.description, self.size, self.skip = 'list', len(documents), 0.0

  def parts(self):
    for i in range(0, len(self.documents), 3):
      yield Part('list', '', i, i + 3, 3)

  def read(self, part):
    yield from self.documents[part.start:part.stop]

  def fingerprint(self):
    return 'listed'


def sides(names, fraction, known=True):
  split = split_source(Listed([Document(name, name) for name in names], known), fraction)
  return [[document.name for document in side] for side in split]


@pytest.fixture
def nanogpt(tmp_path):
  (tmp_path / 'input.txt').write_text('x' * 1_003_854 + 'y' * 111_540)
  return tmp_path / 'input.txt'


def test_a_single_document_is_split_where_nanogpt_splits_it(nanogpt):
  train, valid = split_source(open_source(SourceConfig(path=str(nanogpt))), 0.1)
  assert list(train) == [Document('input.txt', 'x' * 1_003_854)]
  assert list(valid) == [Document('input.txt', 'y' * 111_540)]


@pytest.mark.parametrize('packed', [False, True])
def test_a_single_document_in_pieces_is_split_at_the_same_place(tmp_path, monkeypatch, packed):
  monkeypatch.setattr(TextFiles, 'max_document_bytes', 70)
  text = ''.join(f'líne {i}\n' for i in range(1000))
  path = tmp_path / ('a.txt.gz' if packed else 'a.txt')
  path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
  cut = len(text) * 3 // 4
  complete = open_source(SourceConfig(path=str(path)))
  assert len(list(complete.parts())) > 100
  for side, expected in zip(split_source(complete, 0.25), (text[:cut], text[cut:])):
    side = pickle.loads(pickle.dumps(side))
    assert ''.join(document.text for part in side.parts() for document in side.read(part) if document) == expected


@given(length=st.integers(10, 5000), tenths=st.integers(1, 9))
@settings(max_examples=200, deadline=None, database=None)
def test_the_held_out_fraction_of_a_single_document_is_exact(length, tenths):
  (train,), (valid,) = split_source(Listed([Document('a', 'x' * length)]), tenths / 10)
  assert len(train.text) == length * (10 - tenths) // 10
  assert len(train.text) + len(valid.text) == length


@pytest.mark.parametrize('known', [True, False])
def test_a_source_too_short_to_split_is_an_error(known):
  with pytest.raises(UserError, match=r'^data.valid_fraction: 0.1, expected: .*the 1 characters of list'):
    split_source(Listed([Document('a.txt', 'x')], known), 0.1)


def test_a_source_that_cannot_be_read_is_an_error_of_its_own(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'\x89PNG\r\n\x1a\n\0\0\0\rIHDR')
  (tmp_path / 'a.jsonl').write_text('\n \n')
  for name, error in (('a.txt', r'^.*a\.txt: .* a binary file$'), ('a.jsonl', r"^data.source.path: '.*a\.jsonl', expected: documents")):
    with pytest.raises(UserError, match=error):
      split_source(open_source(SourceConfig(path=str(tmp_path / name))), 0.1)


@given(lengths=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 5000)), min_size=2, max_size=30), fraction=st.floats(0.001, 0.999),
       known=st.booleans())
@settings(max_examples=300, deadline=None, database=None)
def test_the_held_out_amount_is_the_fraction_up_to_a_quarter(lengths, fraction, known):
  documents = [Document(f'{number}', 'x' * length + f'{number}') for number, length in enumerate(lengths)]
  total = sum(len(document.text) for document in documents)
  train, valid = ({document.name: document.text for document in side} for side in split_source(Listed(documents, known), fraction))
  assert all(train.get(document.name, '') + valid.get(document.name, '') == document.text for document in documents)
  assert train and valid and len({*train} & {*valid}) <= 1
  wanted = fraction * total
  assert abs(sum(map(len, valid.values())) - wanted) <= min(wanted, total - wanted) / 4 + 1


def test_a_document_that_fits_is_never_split_for_one_that_does_not():
  train, valid = ([(document.name, len(document.text)) for document in side] for side in split_source(
    Listed([Document('large', 'x' * 10_000), *(Document(f'{i}', 'x' * 100) for i in range(20))]), 0.1))
  assert ('large', 10_000) in train and len(train) + len(valid) == 21


def test_what_is_held_out_is_described():
  words = lambda documents, fraction, known=True: split_source(Listed(documents, known), fraction)[1].held_out
  assert words([Document('a.txt', 'x' * 1000)], 0.1) == '10% of the text: the end of a.txt'
  assert words([Document(name, 'x' * 1000) for name in 'abc'], 0.1) == '10% of the text: the end of c'
  assert words([Document(name, 'x' * 1000) for name in 'abc'], 0.5) == '50% of the text: 1 of 3 documents and the end of b'
  assert words([Document(f'{i}', 'x' * 100) for i in range(10)], 0.1, known=False) == '10% of the text: 1 of 10 documents'


def test_a_large_source_is_split_document_by_document(monkeypatch):
  monkeypatch.setattr('gptjax.data.sources.selection._MEASURED_BYTES', 0)
  small, large = ([Document(f'{kind} {i}', 'x' * length) for i in range(count)] for kind, count, length in (('s', 900, 1), ('l', 3, 700)))
  source = Listed([*small, *large], known=False)
  source.size = 3000
  train, valid = ({document.name: len(document.text) for document in side} for side in split_source(source, 0.1))
  held = {name for name, length in valid.items() if length == 1}
  assert held == {one.name for one in small if is_held_out(one.name, 0.1)} and len(held) + 3 == len(valid)
  assert all((train[document.name], valid[document.name]) == (630, 70) for document in large)


def test_added_documents_move_none_and_the_fraction_is_approximate():
  names = [f'{i}.txt' for i in range(1000)]
  train, valid = sides(names[:500], 0.2)
  more_train, more_valid = sides(names[::-1], 0.2)
  assert set(train) <= set(more_train)
  assert set(valid) <= set(more_valid)
  assert 160 < len(more_valid) < 240


def test_a_source_is_split_alike_whether_its_amounts_are_known_or_it_is_read_first(monkeypatch):
  names = [f'{i}.txt' for i in range(1000)]
  known = sides(names, 0.2)
  assert sides(names, 0.2, known=False) == known
  monkeypatch.setattr('gptjax.data.sources.selection._MEASURED_BYTES', 0)
  monkeypatch.setattr('gptjax.data.sources.selection._LEAST_HELD_OUT', 1)
  assert sides(names, 0.2, known=False) == known


def test_both_sides_have_all_records_and_malformed_ones_are_for_training(tmp_path):
  (tmp_path / 'a.jsonl').write_text(''.join('7\n' if i % 10 == 0 else f'{{"text": "{i}"}}\n' for i in range(100)))
  source = open_source(SourceConfig(path=str(tmp_path), skip=0.2))
  (part,) = source.parts()
  records = [list(side.read(part)) for side in (source, *split_source(source, 0.3))]
  for record, train, valid in zip(*records):
    assert [train, valid] in ([record, None], [None, record])
    assert not isinstance(valid, Malformed)
  assert 10 < sum(record is not None for record in records[2]) < 50


def test_sides_have_different_fingerprints_and_the_places_of_the_source(nanogpt):
  source = Listed([Document(name, name) for name in 'abcdefgh'])
  one = open_source(SourceConfig(path=str(nanogpt)))
  prints = [side.fingerprint() for complete in (source, one) for share in (0.2, 0.8) for side in split_source(complete, share)]
  assert len(set(prints)) == 8
  part = next(source.parts())
  for side in (source, *split_source(source, 0.5)):
    assert str(malformed_error(side, part, Malformed('', '', 1), 3)).startswith('list, record 5: ')
  assert dataclasses.replace(part, start=1) != part
