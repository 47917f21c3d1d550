"""Data is prepared once, found again by what determines it, and never found half-done."""

import argparse
import dataclasses
import gzip
import importlib
import io
import itertools
import lzma
import sys
import threading

import pytest

from gptjax.config import DataConfig, TokenizerConfig, UserError
from gptjax.data import compression_yardsticks, prepare, read_files
from gptjax.data.progress import progress
from gptjax.data.stdlib_corpus import stdlib_sources

module = importlib.import_module('gptjax.data.prepare')  # gptjax.data.prepare is the function


@pytest.fixture
def config(tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  for i in range(12):
    text = f'Text {i}: zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich\r\n' * (i + 3)
    (folder / f'{i}.txt').write_bytes(text.encode())
  return DataConfig(files=str(folder), valid_fraction=0.3, tokenizer=TokenizerConfig(kind='chars'))


@pytest.fixture
def cache(tmp_path):
  return tmp_path / 'cache'


@pytest.fixture
def built_once(monkeypatch):
  """A list of the folders that are built."""
  built, build = [], module._build
  monkeypatch.setattr(module, '_build', lambda directory, *rest: (built.append(directory), build(directory, *rest)))
  return built


def texts(prepared, store):
  stream, bounds = store.tokens.tolist(), [*store.starts.tolist(), len(store.tokens)]
  return [prepared.tokenizer.decode(stream[start:stop]) for start, stop in itertools.pairwise(bounds)]


@pytest.mark.parametrize('tokenizer', [
    TokenizerConfig(kind='chars'), TokenizerConfig(kind='bytes'), TokenizerConfig(vocab_size=300)])
def test_all_documents_are_in_one_of_the_stores(config, cache, tokenizer):
  prepared = prepare(dataclasses.replace(config, tokenizer=tokenizer), cache)
  everything = [document.text for document in read_files(config.files)]
  train, valid = texts(prepared, prepared.train), texts(prepared, prepared.valid)
  assert sorted(train + valid) == sorted(everything)
  assert train
  assert valid
  assert prepared.valid_text.read_bytes() == ''.join(valid).encode()
  assert prepared.valid.bytes == len(prepared.valid_text.read_bytes())
  assert prepared.directory == cache / 'data' / prepared.fingerprint
  assert f'{prepared.train.documents} documents, {prepared.train.targets:,} tokens' in prepared.description
  assert '\n' not in prepared.description


def test_the_second_time_nothing_is_built(config, cache, built_once, capfd):
  first = prepare(config, cache)
  out, err = capfd.readouterr()
  assert out == ''
  assert err
  second = prepare(config, cache)
  assert len(built_once) == 1
  assert capfd.readouterr() == ('', '')
  assert (second.fingerprint, second.description) == (first.fingerprint, first.description)
  assert (second.train.tokens == first.train.tokens).all()


def test_what_determines_the_data_is_in_the_fingerprint_and_nothing_else(config, cache, tmp_path):
  def fingerprint(**changes):
    return prepare(dataclasses.replace(config, **changes), cache).fingerprint

  first = fingerprint()
  assert fingerprint(context=7, isolate_documents=False) == first
  (tmp_path / 'texts').rename(tmp_path / 'moved')
  assert fingerprint(files=str(tmp_path / 'moved')) == first
  others = [fingerprint(files=str(tmp_path / 'moved'), **change)
            for change in ({'valid_fraction': 0.5}, {'tokenizer': TokenizerConfig(kind='bytes')})]
  (tmp_path / 'moved/0.txt').write_text('another text')
  others.append(fingerprint(files=str(tmp_path / 'moved')))
  assert len({first, *others}) == 4


def test_a_killed_run_leaves_nothing_that_is_trusted(config, cache, monkeypatch):
  write_store, calls = module.write_store, []

  def killed(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return write_store(*arguments)

  monkeypatch.setattr(module, 'write_store', killed)
  with pytest.raises(KeyboardInterrupt):
    prepare(config, cache)
  left, = (path for path in (cache / 'data').iterdir() if path.is_dir())
  (left / 'rubbish').touch()
  prepared = prepare(config, cache)
  assert texts(prepared, prepared.valid)
  assert not (prepared.directory / 'rubbish').exists()
  assert not left.exists()


def test_two_at_once_build_once(config, cache, built_once):
  results = []
  threads = [threading.Thread(target=lambda: results.append(prepare(config, cache))) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(built_once) == 1
  assert len({result.fingerprint for result in results}) == 1
  assert len(results) == 3


def test_mistakes_in_the_files_leave_no_data(config, cache, tmp_path):
  (tmp_path / 'texts/5.txt').write_bytes(b'ab\xff')
  with pytest.raises(UserError, match=r'5\.txt, byte 2'):
    prepare(config, cache)
  assert not cache.exists()


def test_the_embedded_corpus_needs_its_dataset_once(cache, monkeypatch, tmp_path):
  for i in range(4):
    (tmp_path / f'{i}.py').write_text(f'x = {i}\n' * 20)
  monkeypatch.setattr(module, 'stdlib_sources', lambda: stdlib_sources(tmp_path))
  config = DataConfig(tokenizer=TokenizerConfig(kind='bytes'))
  first = prepare(config, cache)
  assert first.train.documents + first.valid.documents == 4
  assert (cache / 'tfds').is_dir()
  monkeypatch.delattr(module, 'stdlib_documents')
  assert prepare(config, cache).fingerprint == first.fingerprint


def test_yardsticks_are_what_the_compressors_need(config, cache):
  prepared = prepare(dataclasses.replace(config, files=argparse.__file__), cache)
  text = prepared.valid_text.read_bytes()
  compressed = {'gzip -9': gzip.compress(text, 9), 'xz -9': lzma.compress(text, preset=9)}
  assert compression_yardsticks(prepared) == {name: 8 * len(data) / len(text) for name, data in compressed.items()}


def test_progress_is_a_line_in_a_log_and_a_bar_on_a_terminal(monkeypatch):
  class Terminal(io.StringIO):

    def isatty(self):
      return True

  for stream, drawn in ((io.StringIO(), 'counting: 3 documents\n'), (Terminal(), None)):
    monkeypatch.setattr(sys, 'stderr', stream)
    assert list(progress('counting', ['a', 'b', 'c'])) == ['a', 'b', 'c']
    assert stream.getvalue() == drawn if drawn else 'counting' in stream.getvalue()
