"""Subword tokenizers trained with SentencePiece."""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from gptjax.config import UserError
from gptjax.data.tokenizers import export
from gptjax.data.tokenizers.tokenizer import ALPHABET, SPECIALS, Tokenizer, from_alphabet, to_alphabet, utf8, write_json

MODEL = 'tokenizer.model'
"""SentencePiece's own file in a tokenizer's folder."""

_MAX_CACHED_WORDS, _MAX_CACHED_LENGTH = 2**18, 128


def word_pattern(digits: int) -> str:
  r"""The regular expression of words, whose boundaries no piece crosses.

  A word is one of: letters with the space or sign before them; up to `digits` digits; signs with the line ends and indentation
  after them; line ends and indentation; spaces except the last, which belongs to the next word.

  With 4,096 ids trained on Python's standard library, an id represents 19 % more bytes than with SentencePiece's own rule.
  The limit of 64 bounds the cost of text without spaces.
  """
  return rf'[^\w\n]?[^\W\d]{{1,64}}|\d{{1,{digits}}}| ?[^\w\s]{{1,64}}(?:\n+ *)?|\s*\n *|\s+(?!\S)|\s'


class Words:
  """Splits text into words and symbols, whose concatenation is the text.

  Args:
    pattern: regular expression of a word; it must match at any character.
    symbols: texts that are always one word; the longest takes precedence.
  """

  def __init__(self, pattern: str, symbols: Sequence[str] = ()):
    self.pattern = pattern
    self.symbols = tuple(symbols)
    self._word = re.compile(pattern)
    self._symbol = re.compile('|'.join(map(re.escape, sorted(symbols, key=len, reverse=True)))) if symbols else None

  def split(self, text: str) -> Iterator[str]:
    """Yields the words in order."""
    start = 0
    for symbol in self._symbol.finditer(text) if self._symbol else ():
      yield from map(re.Match.group, self._word.finditer(text, start, symbol.start()))
      yield symbol.group()
      start = symbol.end()
    yield from map(re.Match.group, self._word.finditer(text, start))  # findall's list would be far larger than the text


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
  """Pieces of words learned by SentencePiece: BPE (arXiv:1508.07909) or unigram (arXiv:1804.10959).

  SentencePiece receives the UTF-8 bytes of a word as characters of an alphabet of 256, as in GPT-2, all of which are pieces. So
  any text can be encoded, and nothing in it (a space, a NUL, SentencePiece's own U+2581) has a special meaning.

  Args:
    kind: 'bpe' or 'unigram'.
    model: a serialized SentencePiece model.
    words: splits text before SentencePiece encodes it; its symbols are pieces of the model.

  Raises:
    UserError: the model's special ids differ from those of `Tokenizer`.
  """

  def __init__(self, kind: str, model: bytes, words: Words):
    self.kind, self.model, self.words = kind, model, words
    self._ids = _WordCache(model)
    processor = self._ids.processor
    found = [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()]
    expected = [self.pad_id, self.bos_id, -1, self.unk_id]
    if found != expected:
      raise UserError('tokenizer', f'special ids {found}', f'a {MODEL} trained by this version of gptjax, with {expected}')
    pieces = map(processor.id_to_piece, range(SPECIALS, processor.vocab_size()))
    super().__init__([b''] * SPECIALS + [from_alphabet(piece) for piece in pieces])

  def __reduce__(self):
    return SentencePieceTokenizer, (self.kind, self.model, self.words)

  def _rules(self) -> list[str]:
    return [self.model.hex(), self.words.pattern, *self.words.symbols]

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    ids = io.BytesIO()
    ids.writelines(map(self._ids.__getitem__, self.words.split(text)))  # b''.join would temporarily take 80 bytes per word
    return np.frombuffer(ids.getbuffer(), np.int32)

  def save(self, directory: Path) -> None:
    write_json(directory, {'kind': self.kind, 'words': self.words.pattern, 'symbols': list(self.words.symbols)})
    (directory / MODEL).write_bytes(self.model)

  def save_hugging_face(self, directory: Path) -> None:
    for symbol in self.words.symbols:
      if not symbol.isascii() and set(symbol) <= set(ALPHABET):
        raise UserError('symbol', symbol, "for Hugging Face's files, symbols that are ASCII or have a character outside GPT-2's byte "
                        'alphabet: the tokenizers package would decode this one as bytes')
    processor = self._ids.processor
    scores = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(SPECIALS, self.vocab_size)]
    export.write_tokenizer(directory, export.subword_tokenizer(self.kind, scores, self.words.pattern, self.words.symbols))
