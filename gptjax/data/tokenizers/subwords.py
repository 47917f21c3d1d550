"""Subword tokenizers: GPT-2's, from the two files that OpenAI published, and SentencePiece's; training and loading of tokenizers."""

import collections
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from gptjax.config import LEAST_VOCABULARY, TokenizerConfig, UserError
from gptjax.data.folders import library_errors
from gptjax.data.progress import announce
from gptjax.data.sources.source import Document
from gptjax.data.tokenizers import export
from gptjax.data.tokenizers.published import DESCRIPTION, MODEL, HuggingFaceTokenizer, Published, SentencePieceModel, any_of
from gptjax.data.tokenizers.tokenizer import (
  ALPHABET, FILE, SPECIALS, ByteTokenizer, CharTokenizer, Tokenizer, from_alphabet, to_alphabet, utf8)
from gptjax.files import expanded, json_object

OPENAI_FILES = ('encoder.json', 'vocab.bpe')
"""Ids by token, and, after a line `#version: 0.2`, one merge per line in order, as two tokens."""
HUGGING_FACE_FILES = ('vocab.json', 'merges.txt')  # the same under other names
_SEPARATOR = '<|endoftext|>'

_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
r"""GPT-2's pattern `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` as OpenAI's tiktoken writes it, with
less backtracking."""

_LONG_SPACE = re.compile(r'(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{65536,}')
r"""Long white space by Unicode's definition (Python's has four more characters). By `\s+(?!\S)` its last character starts a word if
anything follows; tiktoken's regex engine would backtrack to there with a stack as deep as the space is long, and fails from 10^6 on."""

_MAX_CACHED_WORDS, _MAX_CACHED_LENGTH = 2**18, 128


class Gpt2Tokenizer(Tokenizer):
  """GPT-2's byte-level BPE (Radford et al. 2019): 50,257 ids, of which '<|endoftext|>' is the last; or another one in such files.

  Uses tiktoken, which is ten times as fast as the `tokenizers` package. The separator is also the pad id, because rows are masked by
  arrays and not by ids. Raises a UserError if tiktoken is not installed, a file is missing or damaged, or the two are inconsistent.
  """

  kind = 'gpt2'
  unk_id = None
  start_ids = ()  # OpenAI and transformers put nothing before a prompt

  def __init__(self, directory: Path):
    renamed = (directory / HUGGING_FACE_FILES[1]).exists() and not (directory / OPENAI_FILES[0]).exists()
    vocab_path, merges_path = (directory / name for name in (HUGGING_FACE_FILES if renamed else OPENAI_FILES))
    self._vocab, self._merges = _read(vocab_path), _read(merges_path)
    self._pairs = _pairs(self._merges, merges_path)
    pieces = [*map(from_alphabet, sorted(ALPHABET)), *(from_alphabet(left + right) for left, right in self._pairs)]
    expected = {to_alphabet(piece): rank for rank, piece in enumerate(pieces)} | {_SEPARATOR: len(pieces)}
    found = json_object(str(vocab_path), self._vocab)
    for token in [*expected, *found]:
      if found.get(token) != expected.get(token):
        raise UserError(f'{vocab_path}: {token!r}', found.get(token), f'{expected.get(token)}, the id that the merges imply')
    super().__init__([*pieces, b''])
    self.pad_id = self.bos_id = self.eos_id = len(pieces)
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    with library_errors('tokenizer', 'gpt2'):
      import tiktoken
    # Without special tokens, all text is encoded as text.
    self._encoding = tiktoken.Encoding('gpt2', pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    ids, start = [], 0
    cuts = (space.end() - 1 for space in _LONG_SPACE.finditer(text) if space.end() < len(text))
    for stop in [*cuts, len(text)]:
      ids.append(self._encoding.encode_to_numpy(text[start:stop]))
      start = stop
    return np.concatenate(ids).astype(np.int32)

  def save(self, directory: Path) -> None:
    super().save(directory)
    self._write(directory, OPENAI_FILES)

  def save_hugging_face(self, directory: Path) -> None:
    tokenizer = export.gpt2_tokenizer(json.loads(self._vocab), self._pairs, _SEPARATOR)
    export.write_tokenizer(directory, tokenizer, dict.fromkeys(('bos_token', 'eos_token'), _SEPARATOR))
    self._write(directory, HUGGING_FACE_FILES)

  def _write(self, directory: Path, names: tuple[str, str]) -> None:
    for name, content in zip(names, (self._vocab, self._merges)):
      (directory / name).write_text(content, encoding='utf-8', newline='')


def _read(path: Path) -> str:
  try:
    return path.read_bytes().decode('utf-8-sig')
  except OSError as error:
    raise UserError('tokenizer', str(path), f"GPT-2's {path.name} ({error.strerror})") from None
  except UnicodeDecodeError as error:
    raise UserError(f'{path}, byte {error.start}', error.object[error.start:error.start + 4], 'UTF-8 text') from None


def _pairs(merges: str, path: Path) -> list[tuple[str, str]]:
  """The two tokens of each merge, in order."""
  pairs, alphabet = [], {*ALPHABET}
  for number, line in enumerate(merges.split('\n')[1:], 2):
    match line.split(' '):
      case [left, right] if alphabet.issuperset(left + right):
        pairs.append((left, right))
      case tokens if tokens != ['']:  # as at the end of the file
        raise UserError(f'{path}:{number}', line[:80], 'two tokens separated by a space')
  return pairs


def word_pattern(digits: int) -> str:
  r"""The regular expression of words, whose boundaries no piece crosses.

  A word is one of: letters with the space or sign before them; up to `digits` digits; signs with the line ends and indentation
  after them; line ends and indentation; spaces except the last, which belongs to the next word. With 4,096 ids trained on Python's
  standard library, an id represents 19 % more bytes than with SentencePiece's own rule. 64 bounds the cost of text without spaces.
  """
  return rf'[^\w\n]?[^\W\d]{{1,64}}|\d{{1,{digits}}}| ?[^\w\s]{{1,64}}(?:\n+ *)?|\s*\n *|\s+(?!\S)|\s'


class Words:
  """Splits text into words, which `pattern` matches at any character, and symbols; the longest symbol takes precedence."""

  def __init__(self, pattern: str, symbols: Sequence[str] = ()):
    self.pattern = pattern
    self.symbols = tuple(symbols)
    self._word = re.compile(pattern)
    self._symbol = re.compile(f'({any_of(symbols)})')

  def split(self, text: str) -> Iterator[str]:
    """The words in order."""
    words = lambda part: map(re.Match.group, self._word.finditer(part))  # findall's list would be far larger than the text
    if not self.symbols:  # without a generator in between, for speed
      return words(text)
    return itertools.chain.from_iterable([part] if i % 2 else words(part) for i, part in enumerate(self._symbol.split(text)))


class _WordCache(dict[str, bytes]):
  """Ids of words as int32 bytes, cached because most words of a text occur repeatedly."""

  def __init__(self, model: bytes):
    self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

  def __missing__(self, word: str) -> bytes:
    ids = np.array(self.processor.encode(to_alphabet(word.encode())), np.int32).tobytes()
    if len(self) >= _MAX_CACHED_WORDS:  # or the words of a large corpus would fill the memory
      self.clear()
    if len(word) <= _MAX_CACHED_LENGTH:
      self[word] = ids
    return ids


class SentencePieceTokenizer(Tokenizer):
  """Pieces of words learned by SentencePiece: 'bpe' (arXiv:1508.07909) or 'unigram' (arXiv:1804.10959), in a serialized model.

  SentencePiece receives the UTF-8 bytes of a word as characters of an alphabet of 256, as in GPT-2, all of which are pieces. So
  any text can be encoded, and nothing in it (a space, a NUL, SentencePiece's own U+2581) has a special meaning. Raises a UserError
  if the model's special ids differ from those of `Tokenizer`.
  """

  def __init__(self, kind: str, model: bytes, words: Words):
    self.kind, self.model, self.words = kind, model, words
    self.saved = {'words': words.pattern, 'symbols': list(words.symbols)}
    self._ids = _WordCache(model)
    processor = self._ids.processor
    found = [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()]
    expected = [self.pad_id, self.bos_id, -1, self.unk_id]
    if found != expected:
      raise UserError('tokenizer', f'special ids {found}', f'a {MODEL} trained by this version of gptjax, with {expected}')
    pieces = map(processor.id_to_piece, range(SPECIALS, processor.vocab_size()))
    super().__init__([b''] * SPECIALS + [from_alphabet(piece) for piece in pieces])

  def __reduce__(self):
    return SentencePieceTokenizer, (self.kind, self.model, self.words), {'plain_chat': self.plain_chat}

  def _rules(self) -> list[str]:
    return [self.model.hex(), self.words.pattern, *self.words.symbols]

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    ids = io.BytesIO()
    ids.writelines(map(self._ids.__getitem__, self.words.split(text)))  # b''.join would temporarily take 80 bytes per word
    return np.frombuffer(ids.getbuffer(), np.int32)

  def save(self, directory: Path) -> None:
    super().save(directory)
    (directory / MODEL).write_bytes(self.model)

  def save_hugging_face(self, directory: Path) -> None:
    for symbol in self.words.symbols:
      if not symbol.isascii() and set(symbol) <= set(ALPHABET):
        raise UserError('symbol', symbol, "for Hugging Face's files, symbols that are ASCII or have a character outside GPT-2's byte "
                        'alphabet: the tokenizers package would decode this one as bytes')
    processor = self._ids.processor
    scores = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(SPECIALS, self.vocab_size)]
    export.write_tokenizer(directory, export.subword_tokenizer(self.kind, scores, self.words.pattern, self.words.symbols))


class VocabularyError(UserError):
  """A vocabulary of `size` ids where the documents allow `most`, and the tokenizer needs `least`.

  The error advises a multiple of `multiple` that is possible, and `otherwise`.
  """

  def __init__(self, size: int, least: int, most: int, multiple: int = 1, otherwise: str = ", or data.tokenizer.kind 'chars' or 'bytes'"):
    self.least, self.most = least, most
    fits = most // multiple * multiple
    advice = f'at most {fits if fits >= least else most} for these documents'
    if most < least:
      advice += f', below the minimum of {least}: more text'
    elif fits < least:
      advice += ', with --multiple=1'
    super().__init__('data.tokenizer.vocab_size', size, advice + otherwise)


def train_tokenizer(
    config: TokenizerConfig, documents: Iterable[Document], *, digits: int = 1, symbols: Sequence[str] = ()) -> Tokenizer:
  """Trains a tokenizer; the same documents, which are read once, give the same one.

  'chars' needs every document that will be encoded, validation included; the other kinds have a piece for every byte, and learn well
  from a `sample`. Pieces of 'bpe' and 'unigram' have at most `digits` digits (GPT-4: 3), and `symbols` are texts that are always one
  id. Raises a VocabularyError if the vocabulary is larger than the documents allow, and another UserError if it is too small for bytes
  and symbols, a text is not valid Unicode, or digits or symbols are invalid.
  """
  if config.kind == 'bytes':
    return ByteTokenizer()
  if config.kind == 'chars':
    return CharTokenizer(''.join(set(itertools.chain.from_iterable(document.text for document in documents))))
  if digits < 1:
    raise UserError('digits', digits, '1 or more digits per piece')
  for symbol in symbols:
    if len(symbol.encode(errors='replace')) < 2 or symbols.count(symbol) > 1:
      raise UserError('symbol', symbol, 'distinct texts of two or more bytes')
    if symbol in ('<pad>', '<s>', '</s>', '<unk>'):
      raise UserError('symbol', symbol, "texts other than SentencePiece's own special tokens")
  return _train_sentencepiece(config, documents, Words(word_pattern(digits), symbols))


def _train_sentencepiece(config: TokenizerConfig, documents: Iterable[Document], words: Words) -> Tokenizer:
  smallest = SPECIALS + len(ALPHABET) + len(words.symbols)
  if config.vocab_size < smallest:
    raise UserError('data.tokenizer.vocab_size', config.vocab_size, f'{smallest} or more: special ids, 256 bytes and symbols')
  counts: collections.Counter[str] = collections.Counter()
  for document in documents:
    utf8(document.text, document.name)
    counts.update(words.split(document.text))
  for symbol in words.symbols:
    del counts[symbol]  # a Counter raises no KeyError
  announce(f'training the {config.kind} tokenizer with {config.vocab_size:,} ids')
  # One word and its count per line. Each byte's character occurs once, so that all are pieces.
  lines = itertools.chain((f'{byte}\t1' for byte in ALPHABET), (f'{to_alphabet(word.encode())}\t{n}' for word, n in counts.items()))
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, input_format='tsv', model_writer=model, model_type=config.kind,
        vocab_size=config.vocab_size, pad_id=Tokenizer.pad_id, bos_id=Tokenizer.bos_id, eos_id=-1, unk_id=Tokenizer.unk_id,
        user_defined_symbols=[to_alphabet(symbol.encode()) for symbol in words.symbols], character_coverage=1.0,
        normalization_rule_name='identity', add_dummy_prefix=False, split_by_unicode_script=False,
        split_by_whitespace=False, max_sentencepiece_length=32, seed_sentencepiece_size=25 * config.vocab_size,
        minloglevel=2, num_threads=8)  # fixed, because the result of unigram depends on it
  except RuntimeError as error:
    limit = re.search(r'Vocabulary size too high .* <= (\d+)', str(error))
    if not limit:
      raise
    raise VocabularyError(config.vocab_size, max(smallest, LEAST_VOCABULARY), int(limit[1])) from None
  return SentencePieceTokenizer(config.kind, model.getvalue(), words)


_PUBLISHED = {DESCRIPTION: 'hugging_face', OPENAI_FILES[0]: 'gpt2', HUGGING_FACE_FILES[1]: 'gpt2', MODEL: 'sentencepiece'}
"""Kinds of published models' tokenizers by a file of their folders, in order of precedence."""


def load_tokenizer(directory: Path | str) -> Tokenizer:
  """Loads a tokenizer from a folder that `Tokenizer.save` wrote, or from a published model's.

  That has tokenizer.json, GPT-2's two files (encoder.json and vocab.bpe, or vocab.json and merges.txt), or tokenizer.model. Raises a
  UserError if the folder has no tokenizer, or a damaged one.
  """
  folder = expanded(directory)
  published = [kind for name, kind in _PUBLISHED.items() if (folder / name).exists()]
  try:
    saved = {'kind': published[0]} if published and not (folder / FILE).exists() else json.loads((folder / FILE).read_text('utf-8-sig'))
    found = _loaded(folder, saved)
    return found.with_plain_chat() if saved.get('plain_chat') else found
  except UserError:
    raise
  except OSError as error:
    raise UserError('tokenizer', str(directory), f"a folder with {FILE} and its other files, or with a published model's {DESCRIPTION}, "
                    f"{MODEL} or {OPENAI_FILES[0]} ({error.strerror}: {error.filename})") from None
  except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, re.error) as error:  # RecursionError is a RuntimeError
    raise UserError('tokenizer', str(directory), f'a folder with an undamaged tokenizer ({type(error).__name__}: {error})') from None


def _loaded(folder: Path, saved: dict[str, Any]) -> Tokenizer:
  match saved['kind']:
    case 'bytes':
      return ByteTokenizer()
    case 'chars':
      return CharTokenizer(saved['characters'])
    case 'gpt2':
      return Gpt2Tokenizer(folder)
    case 'hugging_face':
      return HuggingFaceTokenizer(Published.read(folder))
    case 'sentencepiece':
      return SentencePieceModel(Published.read(folder))
    case 'bpe' | 'unigram':
      return SentencePieceTokenizer(saved['kind'], (folder / MODEL).read_bytes(), Words(saved['words'], saved['symbols']))
  raise UserError(str(folder / FILE), saved['kind'], 'a kind that this version of gptjax supports: bpe, unigram, chars, bytes, gpt2, '
                  'hugging_face, sentencepiece')
