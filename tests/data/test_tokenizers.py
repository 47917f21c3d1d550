"""Any text comes back exactly, text is never taken for a special id, and the same documents give the same tokenizer."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from gptjax.config import TokenizerConfig, UserError
from gptjax.data import Document, TextStream, load_tokenizer, tokenizers, train_tokenizer

ODD = [
    '▁', '▁▁ ▁', '␠', 'Ġ', '⁇', '\0', '\t', '\r\n', '\r', ' ', '    ', '\n\n        ', ' \n \t\n', '\x1c', '\x85',
    '\u2028', '\ufeff', '\ufffd', 'e\u0301', '👩\u200d👩\u200d👧', '日本語', '<s>', '</s>', '<pad>', '<unk>', '<bos>',
    '<eos>', '<0x41>', '<|endoftext|>', "self.x('a')", 'x' * 200]
TEXTS = st.lists(st.text() | st.sampled_from(ODD)).map(''.join)
KINDS = ['bpe', 'unigram', 'bytes']


def code_documents():
  folder = Path(sysconfig.get_path('stdlib'), 'json')
  return [Document(path.name, path.read_text('utf-8')) for path in sorted(folder.glob('*.py'))]


def train(kind, vocab_size=512):
  return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab_size), code_documents())


@pytest.fixture(scope='module')
def trained():
  return {kind: train(kind) for kind in [*KINDS, 'chars']}


@pytest.mark.parametrize('kind', KINDS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None, database=None)
def test_any_text_comes_back_exactly(trained, kind, text):
  tokenizer = trained[kind]
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert ids.ndim == 1
  assert tokenizer.decode(ids) == text
  assert not len(ids) or 4 <= ids.min() <= ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('text', ODD)
def test_odd_text_comes_back_exactly(trained, kind, text):
  assert trained[kind].decode(trained[kind].encode(text)) == text


@pytest.mark.parametrize('kind', KINDS)
def test_odd_text_in_the_training_documents_changes_nothing(kind):
  documents = [*code_documents(), Document('odd', ' '.join(ODD) * 50)]
  tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=512), documents)
  for text in ODD:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.min() >= 4


@pytest.mark.parametrize('kind', [*KINDS, 'chars'])
def test_special_ids_are_four_and_have_no_text(trained, kind):
  tokenizer = trained[kind]
  specials = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id]
  assert sorted(specials) == [0, 1, 2, 3]
  assert tokenizer.decode([*specials, *tokenizer.encode('if x:'), *specials]) == 'if x:'


@pytest.mark.parametrize('kind', KINDS)
def test_every_byte_has_an_id_and_no_two_ids_are_alike(trained, kind):
  pieces = trained[kind].pieces[4:]
  assert len(set(pieces)) == len(pieces) == trained[kind].vocab_size - 4
  assert {bytes([byte]) for byte in range(256)} <= set(pieces)


@pytest.mark.parametrize(('kind', 'size'), [('bpe', 512), ('unigram', 512), ('bytes', 260), ('chars', None)])
def test_vocabulary_has_the_size_asked_for(trained, kind, size):
  characters = {character for document in code_documents() for character in document.text}
  assert trained[kind].vocab_size == (size or 4 + len(characters))


def test_pieces_of_code_hold_line_ends_with_their_indent(trained):
  assert {b'\n    ', b'\n        ', b':\n        '} <= set(trained['bpe'].pieces)


def test_digits_stand_alone(trained):
  for kind in ('bpe', 'unigram'):
    assert len(trained[kind].encode('1024')) == 4


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_the_same_documents_give_the_same_tokenizer(trained, kind):
  assert train(kind).model == trained[kind].model


@pytest.mark.parametrize('kind', [*KINDS, 'chars'])
def test_a_saved_tokenizer_comes_back(trained, kind, tmp_path):
  trained[kind].save(tmp_path / 'new')
  assert json.loads((tmp_path / 'new/tokenizer.json').read_text())['kind'] == kind
  assert {path.suffix for path in (tmp_path / 'new').iterdir()} <= {'.json', '.model'}
  loaded = load_tokenizer(tmp_path / 'new')
  text = code_documents()[0].text
  assert loaded.pieces == trained[kind].pieces
  assert (loaded.encode(text) == trained[kind].encode(text)).all()


def test_a_folder_without_tokenizer_is_named(tmp_path):
  with pytest.raises(UserError, match=rf'{tmp_path}.*tokenizer.json'):
    load_tokenizer(tmp_path)


def test_an_unseen_character_is_named_with_its_place():
  tokenizer = train_tokenizer(TokenizerConfig(kind='chars'), [Document('a', 'abc'), Document('b', 'cd')])
  assert tokenizer.encode('dcba').tolist() == [7, 6, 5, 4]
  with pytest.raises(UserError, match=r"^story.txt, character 2: 'é', accepted: one of the 4 characters"):
    tokenizer.encode('abé', 'story.txt')
  with pytest.raises(UserError, match=r'^text, character 0: '):
    tokenizer.encode('\U0010ffff')


@pytest.mark.parametrize('kind', [*KINDS, 'chars'])
def test_a_lone_surrogate_is_named_with_its_place(trained, kind):
  with pytest.raises(UserError, match=r"^--prompt, character 1: '\\udcff'"):
    trained[kind].encode('a\udcff', '--prompt')


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_more_ids_than_the_documents_have_is_an_error_that_says_how_many(kind):
  documents = [Document('a', 'to be or not to be, that is the question\n' * 5)]
  with pytest.raises(UserError, match=r'^data.tokenizer.vocab_size: 4096, accepted: at most ([0-9]+) ') as error:
    train_tokenizer(TokenizerConfig(kind=kind), documents)
  most = int(str(error.value).split('at most ')[1].split()[0])
  assert tokenizers.SentencePieceTokenizer(kind, _train(kind, most, documents).model).vocab_size == most


def _train(kind, vocab_size, documents):
  config = TokenizerConfig(kind=kind)
  object.__setattr__(config, 'vocab_size', vocab_size)  # below what a config allows
  return train_tokenizer(config, documents)


def test_learning_stops_at_a_count_of_characters(monkeypatch):
  monkeypatch.setattr(tokenizers, '_TRAINING_CHARACTERS', 20_000)
  texts = list(tokenizers._sample(code_documents()))
  assert sum(map(len, texts)) == 20_000
  assert texts == list(tokenizers._sample(code_documents()))


@given(ids=st.lists(st.integers(0, 259)), data=st.data())
@settings(max_examples=150, deadline=None, database=None)
def test_streamed_text_is_the_decoded_text(ids, data):
  tokenizer = tokenizers.ByteTokenizer()
  stream, pieces, start = TextStream(tokenizer), [], 0
  while start < len(ids):
    stop = data.draw(st.integers(start + 1, len(ids)))
    pieces.append(stream.push(ids[start:stop]))
    start = stop
  assert ''.join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_holds_half_a_character_back():
  tokenizer = tokenizers.ByteTokenizer()
  stream = TextStream(tokenizer)
  assert [stream.push([i]) for i in tokenizer.encode('a日b')] == ['a', '', '', '日', 'b']
  assert stream.push(tokenizer.encode('日')[:2]) == ''
  assert stream.finish() == '\ufffd'
  assert tokenizer.decode(tokenizer.encode('日')[:2]) == '\ufffd'
