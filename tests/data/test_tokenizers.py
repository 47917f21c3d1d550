"""Any text decodes to itself, text never becomes a special id, and the same documents give the same tokenizer."""

import io
import json
import pickle
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st

from gptjax.config import TokenizerConfig, UserError
from gptjax.data.sources.source import Document
from gptjax.data.tokenizers import (
  ByteTokenizer, SentencePieceTokenizer, TextStream, VocabularyError, load_tokenizer, subwords, train_tokenizer)

FILE = 'gptjax_tokenizer.json'
ODD = [
    '▁', '▁▁ ▁', '␠', 'Ġ', '⁇', '\0', '\t', '\r\n', '\r', ' ', '    ', '\n\n        ', ' \n \t\n', '\x1c', '\x85',
    '\u2028', '\ufeff', '\ufffd', 'e\u0301', '👩\u200d👩\u200d👧', '日本語', '<s>', '</s>', '<pad>', '<unk>', '<bos>',
    '<eos>', '<0x41>', '<|endoftext|>', "self.x('a')", 'x' * 200]
TEXTS = st.lists(st.text() | st.sampled_from(ODD)).map(''.join)
KINDS = ['bpe', 'unigram', 'bytes']


def code_documents():
  folder = Path(sysconfig.get_path('stdlib'), 'json')
  return [Document(path.name, path.read_text('utf-8')) for path in sorted(folder.glob('*.py'))]


def train(kind, vocab_size=512, **options):
  return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab_size), code_documents(), **options)


@pytest.fixture(scope='module')
def trained():
  return {kind: train(kind) for kind in [*KINDS, 'chars']}


@pytest.mark.parametrize('kind', KINDS)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None, database=None)
def test_any_text_decodes_to_itself(trained, kind, text):
  tokenizer = trained[kind]
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert ids.ndim == 1
  assert tokenizer.decode(ids) == text
  assert not len(ids) or 3 <= ids.min() <= ids.max() < tokenizer.vocab_size


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('text', ODD)
def test_odd_text_decodes_to_itself(trained, kind, text):
  assert trained[kind].decode(trained[kind].encode(text)) == text


@pytest.mark.parametrize('kind', KINDS)
def test_odd_text_in_the_training_documents_changes_nothing(kind):
  documents = [*code_documents(), Document('odd', ' '.join(ODD) * 50)]
  tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=512), documents)
  for text in ODD:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.min() >= 3


@pytest.mark.parametrize('kind', [*KINDS, 'chars'])
def test_the_three_special_ids_have_no_text(trained, kind):
  tokenizer = trained[kind]
  specials = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.unk_id]
  assert specials == [0, 1, 2]
  assert tokenizer.eos_id == tokenizer.bos_id
  assert tokenizer.decode([*specials, *tokenizer.encode('if x:'), *specials]) == 'if x:'


@pytest.mark.parametrize('kind', KINDS)
def test_every_byte_has_an_id_and_no_two_ids_are_alike(trained, kind):
  pieces = trained[kind].pieces[3:]
  assert len(set(pieces)) == len(pieces) == trained[kind].vocab_size - 3
  assert {bytes([byte]) for byte in range(256)} <= set(pieces)


@pytest.mark.parametrize(('kind', 'size'), [('bpe', 512), ('unigram', 512), ('bytes', 259), ('chars', None)])
def test_the_vocabulary_has_the_configured_size(trained, kind, size):
  characters = {character for document in code_documents() for character in document.text}
  assert trained[kind].vocab_size == (size or 3 + len(characters))


def test_pieces_of_code_contain_line_ends_with_indentation(trained):
  assert {b'\n    ', b'\n        ', b':\n        '} <= set(trained['bpe'].pieces)


def test_digits_are_single_pieces(trained):
  for kind in ('bpe', 'unigram'):
    assert len(trained[kind].encode('1024')) == 4


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_a_piece_has_at_most_the_given_number_of_digits(kind):
  documents = [*code_documents(), Document('digits', '1234567 ' * 1000)]
  tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=512), documents, digits=3)
  assert [tokenizer.pieces[i] for i in tokenizer.encode('1234567')] == [b'123', b'456', b'7']
  with pytest.raises(UserError, match='^digits: 0, expected: 1 or more'):
    train(kind, digits=0)


SYMBOLS = ['<|user|>', '. The', 'ab', 'abc', '日本', '\n\n', ',"x"', 'a,b', '\t\0', '||', 'self']


@pytest.fixture(scope='module')
def with_symbols():
  return {kind: train(kind, symbols=SYMBOLS) for kind in ('bpe', 'unigram')}


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
@given(before=TEXTS, symbol=st.sampled_from(SYMBOLS), after=TEXTS)
@settings(max_examples=150, deadline=None, database=None)
def test_a_symbol_is_one_id_at_any_position(with_symbols, kind, before, symbol, after):
  tokenizer = with_symbols[kind]
  ids = tokenizer.encode(before + symbol + after)
  assert tokenizer.decode(ids) == before + symbol + after
  if not any(part in before + after for part in 'ab.,|\n\t日sel<'):  # no other symbol reaches into this one
    assert (ids == 3 + SYMBOLS.index(symbol)).sum() == 1
    assert ids.tolist() == [*tokenizer.encode(before), *tokenizer.encode(symbol), *tokenizer.encode(after)]


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_the_longest_symbol_takes_precedence_and_symbols_have_the_first_ids(with_symbols, kind, tmp_path):
  tokenizer = with_symbols[kind]
  assert [piece.decode() for piece in tokenizer.pieces[3:3 + len(SYMBOLS)]] == SYMBOLS
  assert tokenizer.encode('xabcx').tolist() == [*tokenizer.encode('x'), 3 + SYMBOLS.index('abc'), *tokenizer.encode('x')]
  tokenizer.save(tmp_path)
  text = ' x'.join(SYMBOLS)
  assert (load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)).all()


@pytest.mark.parametrize('symbols', [[''], ['a'], ['ab', 'cd', 'ab']])
def test_symbols_are_distinct_and_longer_than_a_byte(symbols):
  with pytest.raises(UserError, match=rf"^symbol: {symbols[0]!r}, expected: distinct texts of two or more bytes$"):
    train('bpe', symbols=symbols)


def test_symbols_that_leave_no_ids_for_bytes_are_an_error():
  with pytest.raises(UserError, match=r'^data.tokenizer.vocab_size: 300, expected: 309 or more'):
    train('bpe', 300, symbols=[f'<{i}>' for i in range(50)])


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_the_same_documents_give_the_same_tokenizer(trained, kind):
  assert train(kind).model == trained[kind].model


@pytest.mark.parametrize('kind', [*KINDS, 'chars'])
def test_a_saved_tokenizer_loads_unchanged(trained, kind, tmp_path):
  trained[kind].save(tmp_path / 'new')
  assert json.loads((tmp_path / 'new/gptjax_tokenizer.json').read_text())['kind'] == kind
  assert {path.suffix for path in (tmp_path / 'new').iterdir()} <= {'.json', '.model'}
  loaded = load_tokenizer(tmp_path / 'new')
  text = code_documents()[0].text
  assert loaded.pieces == trained[kind].pieces
  assert (loaded.encode(text) == trained[kind].encode(text)).all()
  assert loaded.sha256 == trained[kind].sha256 == pickle.loads(pickle.dumps(loaded)).sha256


def test_other_tokenizers_have_other_digests(trained, with_symbols):
  others = [train('bpe', 513), train('bpe', digits=3), train_tokenizer(TokenizerConfig(kind='chars'), [Document('a', 'ab')])]
  others.append(train_tokenizer(TokenizerConfig(kind='chars'), [Document('a', 'ac')]))
  words = subwords.Words(trained['bpe'].words.pattern + '|x')
  others.append(SentencePieceTokenizer('bpe', trained['bpe'].model, words))  # the same pieces, but other words
  every = [*trained.values(), *with_symbols.values(), *others]
  assert len({tokenizer.sha256 for tokenizer in every}) == len(every)
  assert all(len(tokenizer.sha256) == 64 for tokenizer in every)


@pytest.mark.parametrize(('name', 'text', 'message'), [
  (FILE, '{"kind": "bpe"', 'undamaged'), (FILE, '[]', 'undamaged'), (FILE, '{"kind": "bpe"}', 'undamaged'),
  (FILE, '[' * 100_000, 'undamaged'), (FILE, '{"kind": "bpe", "words": "(", "symbols": []}', 'undamaged'),
  (FILE, '{"kind": "wordpiece"}', "'wordpiece', expected: a kind"), ('tokenizer.model', 'x', 'undamaged'),
  ('tokenizer.model', None, 'No such file')])
def test_a_damaged_folder_is_one_error(trained, tmp_path, name, text, message):
  trained['bpe'].save(tmp_path)
  (tmp_path / name).unlink()
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message) as error:
    load_tokenizer(tmp_path)
  assert str(tmp_path) in str(error.value)


def test_the_home_of_an_unknown_user_is_one_error():
  with pytest.raises(UserError, match='~nobody_of_this_name/x'):
    load_tokenizer('~nobody_of_this_name/x')


def test_a_model_with_other_special_ids_is_rejected(trained):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['a b']), model_writer=model, vocab_size=8, hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2,
    unk_id=3, minloglevel=2)
  with pytest.raises(UserError, match=r"'special ids \[0, 1, 2, 3\]', expected: .* trained by this version of gptjax"):
    SentencePieceTokenizer('unigram', model.getvalue(), trained['bpe'].words)


def test_the_number_of_cached_words_is_bounded(trained, monkeypatch):
  tokenizer = pickle.loads(pickle.dumps(trained['bpe']))
  expected = tokenizer.encode(' '.join(f'word{i}' for i in range(1000)))
  monkeypatch.setattr(subwords, '_MAX_CACHED_WORDS', 10)
  tokenizer = pickle.loads(pickle.dumps(tokenizer))
  assert (tokenizer.encode(' '.join(f'word{i}' for i in range(1000))) == expected).all()
  tokenizer.encode(' ' * 1000)
  assert 0 < len(tokenizer._ids) <= 10
  assert max(map(len, tokenizer._ids)) <= 128


@pytest.mark.parametrize('text', ['a' * 10**6, ' ' * 10**6 + 'b', '\n' * 10**6 + 'b', '!' * 10**6, '\t ' * 10**5 + 'b'])
def test_long_texts_without_words_are_encoded_quickly(trained, text):
  assert trained['bpe'].decode(trained['bpe'].encode(text)) == text


def test_a_folder_without_tokenizer_is_named(tmp_path):
  with pytest.raises(UserError, match=rf'{tmp_path}.*gptjax_tokenizer.json'):
    load_tokenizer(tmp_path)


def test_the_error_for_an_unseen_character_has_its_position():
  tokenizer = train_tokenizer(TokenizerConfig(kind='chars'), [Document('a', 'abc'), Document('b', 'cd')])
  assert tokenizer.encode('dcba').tolist() == [6, 5, 4, 3]
  with pytest.raises(UserError, match=r"^story.txt, character 2: 'é', expected: one of the 4 characters"):
    tokenizer.encode('abé', 'story.txt')
  with pytest.raises(UserError, match=r'^text, character 0: '):
    tokenizer.encode('\U0010ffff')


@pytest.mark.parametrize('kind', [*KINDS, 'chars'])
def test_the_error_for_a_lone_surrogate_has_its_position(trained, kind):
  with pytest.raises(UserError, match=r"^--prompt, character 1: '\\udcff'"):
    trained[kind].encode('a\udcff', '--prompt')


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_more_ids_than_the_documents_have_is_an_error_that_says_how_many(kind):
  documents = [Document('a', 'to be or not to be, that is the question\n' * 5)]
  with pytest.raises(UserError, match=r'^data.tokenizer.vocab_size: 4096, expected: at most ([0-9]+) ') as error:
    train_tokenizer(TokenizerConfig(kind=kind), documents)
  limit = int(str(error.value).split('at most ')[1].split()[0])
  assert _train(kind, limit, documents).vocab_size == limit
  # No config allows fewer than 300 ids.
  assert (', below the minimum of 300: more text, or' in str(error.value)) == (limit < 300)


@pytest.mark.parametrize(('most', 'advice'), [
  (1000, 'at most 960 for these documents'), (310, 'at most 310 for these documents, with --multiple=1'),
  (268, 'at most 268 for these documents, below the minimum of 300: more text')])
def test_a_size_is_advised_that_is_possible_in_multiples(most, advice):
  assert str(VocabularyError(4096, 300, most, 64, '')) == f'data.tokenizer.vocab_size: 4096, expected: {advice}'


def _train(kind, vocab_size, documents):
  config = TokenizerConfig(kind=kind)
  object.__setattr__(config, 'vocab_size', vocab_size)  # below what a config allows
  return train_tokenizer(config, documents)


def test_training_errors_name_a_document_with_lone_surrogates():
  with pytest.raises(UserError, match=r"^bad, character 1: '\\ud800'"):
    train_tokenizer(TokenizerConfig(), [Document('good', 'text'), Document('bad', 'a\ud800')])


@given(ids=st.lists(st.integers(0, 258)), data=st.data())
@settings(max_examples=150, deadline=None, database=None)
def test_streamed_text_is_the_decoded_text(ids, data):
  tokenizer = ByteTokenizer()
  stream, pieces, start = TextStream(tokenizer), [], 0
  while start < len(ids):
    stop = data.draw(st.integers(start + 1, len(ids)))
    pieces.append(stream.push(ids[start:stop]))
    start = stop
  assert ''.join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_holds_back_incomplete_characters():
  tokenizer = ByteTokenizer()
  stream = TextStream(tokenizer)
  assert [stream.push([i]) for i in tokenizer.encode('a日b')] == ['a', '', '', '日', 'b']
  assert stream.push(tokenizer.encode('日')[:2]) == ''
  assert stream.finish() == '\ufffd'
  assert tokenizer.decode(tokenizer.encode('日')[:2]) == '\ufffd'
