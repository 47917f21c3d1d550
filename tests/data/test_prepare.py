"""Data is prepared once, cached by everything that determines it, and never found incomplete."""

import argparse
import dataclasses
import gzip
import importlib
import io
import lzma
import os
import sys
import threading

import numpy as np
import pytest
from small_stores import texts

from gptjax.config import Component, Config, DataConfig, Phase, SourceConfig, TokenizerConfig, UserError, ValidationSet
from gptjax.data import Document, Recipe, compression_baselines, open_source, prepare, train_rows, write_store
from gptjax.data.progress import ProgressBar
from gptjax.data.tokenizers import ByteTokenizer, CharTokenizer

module = importlib.import_module('gptjax.data.prepare')  # gptjax.data.prepare is the function


@pytest.fixture
def config(tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  for i in range(12):
    text = f'Text {i}: zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich\r\n' * (i + 3)
    (folder / f'{i}.txt').write_bytes(text.encode())
  return DataConfig(source=SourceConfig(str(folder)), valid_fraction=0.3, tokenizer=TokenizerConfig(kind='chars'))


@pytest.fixture
def cache(tmp_path):
  return tmp_path / 'cache'


@pytest.fixture
def built_once(monkeypatch):
  """A list of the sources from which stores are built."""
  built, split = [], module.split_source
  monkeypatch.setattr(module, 'split_source', lambda source, fraction: (built.append(source), split(source, fraction))[1])
  return built


@pytest.mark.parametrize('tokenizer', [
    TokenizerConfig(kind='chars'), TokenizerConfig(kind='bytes'), TokenizerConfig(vocab_size=300)])
def test_all_documents_are_in_one_of_the_stores(config, cache, tokenizer):
  prepared = prepare(dataclasses.replace(config, tokenizer=tokenizer), cache)
  everything = [record.text for record in open_source(config.source) if isinstance(record, Document)]
  train, valid = texts(prepared.layouts[0].store), texts(prepared.valid['valid'])
  assert sorted(train + valid) == sorted(everything) and train and valid
  assert prepared.valid['valid'].bytes == len(''.join(valid).encode())
  assert f'{len(train)} documents, {prepared.layouts[0].store.tokens:,} tokens' in prepared.description
  share = prepared.valid['valid'].bytes / len(''.join(everything).encode())
  assert f' bytes (held out: {100 * share:.3g}% of the text: {len(valid)} of 12 documents); rows' in prepared.description
  assert '\n' not in prepared.description


def test_an_existing_tokenizer_is_used(config, cache, tmp_path):
  ByteTokenizer().save(tmp_path / 'tok')
  prepared = prepare(dataclasses.replace(config, tokenizer=TokenizerConfig(path=str(tmp_path / 'tok'))), cache)
  assert prepared.tokenizer.sha256 == ByteTokenizer().sha256
  with pytest.raises(UserError, match='tokenizer'):
    prepare(dataclasses.replace(config, tokenizer=TokenizerConfig(path=str(tmp_path / 'nothing'))), cache)


def test_the_second_time_nothing_is_built(config, cache, built_once, capfd):
  first = prepare(config, cache)
  out, err = capfd.readouterr()
  assert out == '' and err
  second = prepare(config, cache)
  assert len(built_once) == 1 and capfd.readouterr() == ('', '')
  assert (second.fingerprint, second.description) == (first.fingerprint, first.description)


def test_the_fingerprint_depends_on_everything_that_determines_the_data_and_nothing_else(config, cache, tmp_path):
  fingerprint = lambda **changes: prepare(dataclasses.replace(config, **changes), cache).fingerprint
  first = fingerprint()
  assert fingerprint(context=7, isolate_documents=False, rows='pack') == first
  (tmp_path / 'texts').rename(tmp_path / 'moved')
  for path in (tmp_path / 'moved').iterdir():
    os.utime(path, (1, 1))
  moved = SourceConfig(str(tmp_path / 'moved'))
  assert fingerprint(source=moved) == first
  others = [fingerprint(source=moved, **change) for change in ({'valid_fraction': 0.5}, {'tokenizer': TokenizerConfig(kind='bytes')})]
  (tmp_path / 'moved/0.txt').write_text('another text')
  others.append(fingerprint(source=moved))
  assert len({first, *others}) == 4


def test_incomplete_data_of_a_killed_run_is_not_used(config, cache, monkeypatch):
  calls = []

  def killed(*arguments, **named):
    calls.append(arguments)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return write_store(*arguments, **named)

  monkeypatch.setattr(module, 'write_store', killed)
  with pytest.raises(KeyboardInterrupt):
    prepare(config, cache)
  left, = (path for path in (cache / 'data').iterdir() if path.is_dir())
  assert left.suffix == '.building'
  prepared = prepare(config, cache)
  assert texts(prepared.valid['valid'])
  assert not left.exists() and len(list((cache / 'data').iterdir())) == 1


def test_concurrent_calls_build_once(config, cache, built_once):
  results = []
  threads = [threading.Thread(target=lambda: results.append(prepare(config, cache))) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(built_once) == 1 and len(results) == 3 and len({result.fingerprint for result in results}) == 1


def test_errors_in_the_files_leave_no_data(config, cache, tmp_path):
  (tmp_path / 'texts/5.txt').write_bytes(b'ab\xff')
  with pytest.raises(UserError, match=r'5\.txt, byte 2'):
    prepare(config, cache)
  assert not list(cache.rglob('*.*'))


@pytest.fixture
def stores(tmp_path):
  """Folders of three stores of bytes, of 20, 10 and 5 documents of 9 bytes."""
  folders = {}
  for name, count in (('a', 20), ('b', 10), ('c', 5)):
    (tmp_path / f'{name}.txt').write_text('\n'.join(f'{name} is {i:04d}' for i in range(count)))
    source = open_source(SourceConfig(str(tmp_path / f'{name}.txt'), separator='\\n'))
    folders[name] = str(tmp_path / 'stores' / name)
    write_store(tmp_path / 'stores' / name, Recipe(source, ByteTokenizer()))
  return folders


def mixture(stores, **changes):
  return DataConfig(train=(Component(stores['a'], 3.0), Component(stores['b'], 1.0)), context=10,
                    valid=(ValidationSet('one', stores['c'], ('x',)), ValidationSet('two', stores['b'], ('x', 'y'))), **changes)


def test_stores_are_mixed_and_validated_by_name(stores, cache):
  prepared = prepare(mixture(stores), cache)
  assert [*prepared.valid] == ['one', 'two'] and prepared.tags == {'x': ['one', 'two'], 'y': ['two']}
  rows = train_rows(Config(data=mixture(stores)), prepared)
  components, _ = rows.mixture.locate(np.arange(400))
  assert np.bincount(components).tolist() == [300, 100] and rows.rows_per_epoch == 20 + 10
  assert not cache.exists()


def test_phases_in_steps_follow_the_batch_size_and_others_do_not(stores, cache):
  def shares(start, batch_size):
    data = mixture(stores, phases=(Phase(start, (0.0, 1.0)),))
    components, _ = train_rows(Config(data=data, batch_size=batch_size), prepare(data, cache)).mixture.locate(np.arange(200))
    return int(np.flatnonzero(components == 0).max()) + 1

  assert (shares('10 steps', 4), shares('10 steps', 8)) == (pytest.approx(40, abs=3), pytest.approx(80, abs=3))
  assert shares('400 tokens', 4) == shares('400 tokens', 8) == pytest.approx(40, abs=3)
  assert shares('2 epochs', 4) == pytest.approx(60, abs=3)


def test_epochs_are_limits_in_passes(stores, cache):
  data = DataConfig(train=(Component(stores['a'], 1.0, epochs=1.5), Component(stores['b'], 1.0, epochs=1.0)), context=10,
                    valid=(ValidationSet('v', stores['c']),))
  assert train_rows(Config(data=data), prepare(data, cache)).mixture.rows == 30 + 10


def test_stores_of_different_tokenizers_are_refused(stores, cache, tmp_path):
  write_store(tmp_path / 'other', Recipe(open_source(SourceConfig(str(tmp_path / 'a.txt'))), CharTokenizer('abcdefghijkls 0123456789\n')))
  for data in (dataclasses.replace(mixture(stores), train=(Component(stores['a']), Component(str(tmp_path / 'other')))),
               dataclasses.replace(mixture(stores), valid=(ValidationSet('v', str(tmp_path / 'other')),))):
    with pytest.raises(UserError, match=r"^data: store: '.*other', expected: a store made with the tokenizer of .*/a, "):
      prepare(data, cache)


def test_a_damaged_store_is_refused_before_training(stores, cache, tmp_path):
  shard = tmp_path / 'stores/b/00000.shard'
  shard.write_bytes(shard.read_bytes()[:-3])
  with pytest.raises(UserError, match=r'stores/b/00000.shard: .*restore it'):
    prepare(mixture(stores), cache)


def test_a_context_longer_than_a_side_is_an_error_with_the_tokens_of_both(config, stores, cache):
  prepared = prepare(config, cache)
  train, valid = prepared.layouts[0].store.tokens, prepared.valid['valid'].tokens
  prepare(dataclasses.replace(config, context=valid), cache)
  for context in (valid + 1, train + 1):
    with pytest.raises(UserError, match=f'^data.context: {context}, expected: {valid:,} or less: there are {train:,} tokens to train '
                       f'on and {valid:,} to validate on; or more text$'):
      prepare(dataclasses.replace(config, context=context), cache)
  prepare(dataclasses.replace(mixture(stores), context=150), cache)  # no store alone has as many tokens to validate on
  with pytest.raises(UserError, match='^data.context: 151, expected: 150 or less: there are 200 tokens to train on and 150 to'):
    prepare(dataclasses.replace(mixture(stores), context=151), cache)


def test_baselines_are_the_sizes_of_compressed_text(config, cache):
  prepared = prepare(dataclasses.replace(config, source=SourceConfig(argparse.__file__)), cache)
  text, = texts(prepared.valid['valid'])
  text = text.encode()
  compressed = {'gzip -9': gzip.compress(text, 9), 'xz -9': lzma.compress(text, preset=9)}
  assert compression_baselines(prepared.tokenizer, prepared.valid) == {
    name: 8 * len(data) / len(text) for name, data in compressed.items()}


def test_progress_is_a_line_in_a_log_and_a_bar_on_a_terminal(monkeypatch):
  class Terminal(io.StringIO):

    def isatty(self):
      return True

  for stream, drawn in ((io.StringIO(), 'counting: 3 documents\n'), (Terminal(), None)):
    monkeypatch.setattr(sys, 'stderr', stream)
    with ProgressBar('counting', 3, 'documents') as progress:
      for _ in range(3):
        progress.advance(1)
    assert stream.getvalue() == drawn if drawn else 'counting' in stream.getvalue()
