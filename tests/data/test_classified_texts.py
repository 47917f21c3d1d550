"""Texts to classify: the class is the target of a text's last token, in any row, and mistakes in labels are named."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gptjax.config import Component, DataConfig, SourceConfig, TokenizerConfig, UserError, ValidationSet
from gptjax.data import EvalRows, Mixture, Packed, Recipe, TrainRows, open_source, prepare, write_store
from gptjax.data.examples import marked_example
from gptjax.data.sources import Malformed, split_source
from gptjax.data.tokenizers import ByteTokenizer

LABELS = ('bad', 'good', 'odd')
RECORDS = [{'text': f'{"long " * (i % 4)}{i}.', 'label': LABELS[i * i % 3]} for i in range(40)]


def source(folder, records, **values):
  """A source of records with classes."""
  path = folder / 'records.jsonl'
  path.write_text('\n'.join(map(json.dumps, records)))
  return SourceConfig(str(path), **{'label': 'label', 'labels': LABELS, **values})


@pytest.fixture
def store(tmp_path):
  return write_store(tmp_path / 'store', Recipe(open_source(source(tmp_path, RECORDS)), ByteTokenizer()))


def texts_of(batch):
  """(text, class) of each target in a batch; each one is that of the last token of its text, after which only the class itself comes."""
  found = []
  for row, at in np.argwhere(batch['mask'] > 0):
    here = batch['segments'][row] == batch['segments'][row, at]
    assert np.flatnonzero(here)[-1] == at + 1 and batch['tokens'][row, at + 1] == batch['targets'][row, at]
    found.append((ByteTokenizer().decode(batch['tokens'][row][here][:-1]), LABELS[batch['targets'][row, at]]))
  return sorted(found)


def test_the_class_is_the_one_target_of_a_text_in_any_row(store, tmp_path):
  wanted = sorted((record['text'], record['label']) for record in RECORDS)
  for kind in ('pack', 'document'):
    layout = Packed(store, 32, kind, tmp_path)
    assert texts_of(TrainRows([layout], Mixture([layout.count], [1.0]), 32, 0, True).batch(np.arange(layout.count))) == wanted
  valid = EvalRows(store, 32, True, tmp_path)
  assert texts_of(valid.batch(np.arange(valid.count + 1))) == wanted
  assert store.targets == 40 and store.label_counts == {'bad': 14, 'good': 26, 'odd': 0} and store.labels == LABELS
  assert marked_example(store, ByteTokenizer(), 1) == '<1>long 1.⟦good⟧'


def test_a_long_text_is_cut_to_its_end_and_keeps_its_class(store, tmp_path):
  layout = Packed(store, 12, 'pack', tmp_path, cut=True)
  found = texts_of(TrainRows([layout], Mixture([layout.count], [1.0]), 12, 0, True).batch(np.arange(layout.count)))
  assert found == sorted((record['text'][-11:], record['label']) for record in RECORDS) and layout.cut > 10
  assert Packed(store, 12, 'pack', tmp_path).dropped == layout.cut


@pytest.mark.parametrize('ending', ['jsonl', 'parquet'])
def test_numbers_and_names_of_classes(ending, tmp_path):
  records = [{'a': 'x', 'b': 1, 'label': 2}, {'a': 'y', 'b': 2, 'label': 0}]
  config = source(tmp_path, records, text='{a}{b}')
  if ending == 'parquet':
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / 'records.parquet')
    config = SourceConfig(str(tmp_path / 'records.parquet'), text='{a}{b}', label='label', labels=LABELS)
  assert [(one.text, one.label) for one in open_source(config)] == [('x1', 2), ('y2', 0)]
  stars = open_source(source(tmp_path, [{'text': 'x', 'label': 1}, {'text': 'x', 'label': 0}], labels=('1', '2')))
  first, second = stars  # a number is the name of a class here, and not its place
  assert first.label == 0 and isinstance(second, Malformed)
  assert stars.fingerprint() != open_source(source(tmp_path, [{'text': 'x', 'label': 1}, {'text': 'x', 'label': 0}])).fingerprint()


@pytest.mark.parametrize('record, words', [
  ({'text': 'a', 'label': 'goood'}, "'goood', expected: a label in the field label: bad, good, odd; did you mean good?"),
  ({'text': 'a', 'label': 3}, "'3', expected: a label"), ({'text': 'a', 'label': None}, "'None', expected: a label"),
  ({'text': 'a', 'label': True}, "'True', expected: a label"), ({'text': 'a', 'label': ['bad']}, 'expected: a label'),
  ({'text': 'a', 'labels': 'bad'}, "'label', expected: a field that the record has: text, labels; did you mean labels?"),
  ({'label': 'bad'}, 'a field that the record has'), ({'text': ' ', 'label': 'bad'}, 'a text to classify')])
def test_a_record_without_a_text_and_its_class_is_an_error_that_names_it(record, words, tmp_path):
  with pytest.raises(UserError) as error:
    write_store(tmp_path / 'store', Recipe(open_source(source(tmp_path, [RECORDS[0], record])), ByteTokenizer()))
  assert 'records.jsonl:2: ' in str(error.value) and words in str(error.value)


@pytest.mark.parametrize('values, field', [
  ({'label': 'a'}, 'labels'), ({'labels': LABELS}, 'label'), ({'label': 'a', 'labels': ('x',)}, 'labels'),
  ({'label': 'a', 'labels': ('x', 'x')}, 'labels'), ({'label': 'a', 'labels': ('x', ' ')}, 'labels'),
  ({'label': 'a', 'labels': LABELS, 'messages': 'm', 'chat': 'plain'}, 'label'),
  ({'label': 'a', 'labels': LABELS, 'chat': 'plain'}, 'chat')])
def test_fields_that_do_not_go_together(values, field):
  with pytest.raises(UserError, match=f'^data.source.{field}: '):
    SourceConfig(**values)


@pytest.mark.parametrize('path', ['texts.txt', ''])
def test_documents_without_fields_have_no_label(path, tmp_path):
  (tmp_path / 'texts.txt').write_text('a text')
  with pytest.raises(UserError, match="^data.source.label: 'label', expected: none for .*: they have no records"):
    open_source(SourceConfig(path and str(tmp_path / path), label='label', labels=LABELS), tmp_path)


def test_texts_are_held_out_with_their_classes(tmp_path):
  train, valid = ([(one.text, one.label) for one in side] for side in split_source(open_source(source(tmp_path, RECORDS)), 0.2))
  assert len(valid) == 8 and sorted(train + valid) == sorted((record['text'], LABELS.index(record['label'])) for record in RECORDS)


def test_stores_that_do_not_fit_together(store, tmp_path):
  only = [{**record, 'label': 'good'} for record in RECORDS]
  with pytest.raises(UserError, match="two classes or more: all texts to train on are 'good'"):
    prepare(DataConfig(source(tmp_path, only), tokenizer=TokenizerConfig('bytes'), context=64, rows='pack'), tmp_path)
  other = write_store(tmp_path / 'other', Recipe(open_source(source(tmp_path, RECORDS, labels=LABELS[::-1])), ByteTokenizer()))
  renamed = write_store(tmp_path / 'renamed', Recipe(open_source(source(tmp_path, [
    {**record, 'label': LABELS.index(record['label'])} for record in RECORDS], labels=('x', 'y', 'z'))), ByteTokenizer()))
  data = lambda *stores: prepare(DataConfig(train=tuple(Component(one.location) for one in stores), context=64, rows='pack',
                                            valid=(ValidationSet('a', stores[0].location),)), tmp_path)
  with pytest.raises(UserError, match='^data: store: .* with the classes of .*, bad, good, odd, and not odd, good, bad'):
    data(store, other)
  assert renamed.sha256 == store.sha256 and data(renamed).fingerprint != data(store).fingerprint  # equal ids, other classes
