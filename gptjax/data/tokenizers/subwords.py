"""Tokenizers of pieces of words that SentencePiece learned."""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from gptjax.config import UserError
from gptjax.data.tokenizers import export
from gptjax.data.tokenizers.tokenizer import ALPHABET, SPECIALS, Tokenizer, in_alphabet, in_bytes, utf8, write

MODEL = 'tokenizer.model'
"""SentencePiece's own file in a tokenizer's folder."""

_KEPT_WORDS, _KEPT_LENGTH = 2**18, 128


def words_of(digits: int) -> str:
  r"""The regular expression of words, whose borders no SentencePiece piece crosses.

  A word is: letters with the space or sign before them; a digit, or up to so many; signs with the line ends and the
  indent after them; line ends and indents; spaces but the last, which goes with the next word.

  Of 4,096 ids trained on Python's standard library, each then holds 19 % more bytes than under SentencePiece's own rule.
  The 64 bounds what a text without spaces costs.
  """
  return rf'[^\w\n]?[^\W\d]{{1,64}}|\d{{1,{digits}}}| ?[^\w\s]{{1,64}}(?:\n+ *)?|\s*\n *|\s+(?!\S)|\s'


class Words:
  """Cuts text into words and symbols; all of them together are the text.

  Args:
    pattern: regular expression of a word; it matches at any character.
    symbols: texts that are words wherever they stand, the longest first where one begins with another.
  """

  def __init__(self, pattern: str, symbols: Sequence[str] = ()):
    self.pattern = pattern
    self.symbols = tuple(symbols)
    self._word = re.compile(pattern)
    self._symbol = re.compile('|'.join(map(re.escape, sorted(symbols, key=len, reverse=True)))) if symbols else None

  def cut(self, text: str) -> Iterator[str]:
    """The words, in order."""
    if not self._symbol:
      return map(re.Match.group, self._word.finditer(text))  # findall's list would be far larger than the text
    return self._around(self._symbol, text)

  def _around(self, symbols: re.Pattern[str], text: str) -> Iterator[str]:
    start = 0
    for symbol in symbols.finditer(text):
      yield from map(re.Match.group, self._word.finditer(text, start, symbol.start()))
      yield symbol.group()
      start = symbol.end()
    yield from map(re.Match.group, self._word.finditer(text, start))


class _IdsOfWords(dict[str, bytes]):
  """Ids of words as the bytes of int32, kept, since most of a text is words seen before."""

  def __init__(self, model: bytes):
    self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)

  def __missing__(self, word: str) -> bytes:
    ids = np.array(self.processor.encode(in_alphabet(word)), np.int32).tobytes()
    if len(self) >= _KEPT_WORDS:  # or the words of a large corpus would fill the memory
      self.clear()
    if len(word) <= _KEPT_LENGTH:
      self[word] = ids
    return ids


class SentencePieceTokenizer(Tokenizer):
  """Pieces of words, learned with SentencePiece: BPE (arXiv:1508.07909) or unigram (arXiv:1804.10959).

  SentencePiece sees the UTF-8 bytes of a word as characters of an alphabet of 256 (as GPT-2 does), all of them pieces:
  there is always a byte to fall back to. So every text has ids, and nothing in it (a space, a NUL, SentencePiece's own
  U+2581) means anything special.

  Args:
    kind: 'bpe' or 'unigram'.
    model: what SentencePiece saves.
    words: how text is cut before SentencePiece sees it; its symbols are pieces of the model.

  Raises:
    UserError: the model has other special ids than `Tokenizer`.
  """

  def __init__(self, kind: str, model: bytes, words: Words):
    self.kind = kind
    self.model = model
    self.words = words
    self._ids = _IdsOfWords(model)
    processor = self._ids.processor
    found = [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()]
    if found != [self.pad_id, self.bos_id, -1, self.unk_id]:
      raise UserError('tokenizer', f'special ids {found}', f'a {MODEL} that this version of gptjax trained, with '
                      f'{[self.pad_id, self.bos_id, -1, self.unk_id]}')
    pieces = map(processor.id_to_piece, range(SPECIALS, processor.vocab_size()))
    super().__init__([b''] * SPECIALS + [in_bytes(piece) for piece in pieces])

  def __reduce__(self):
    return SentencePieceTokenizer, (self.kind, self.model, self.words)

  def _rules(self) -> list[str]:
    return [self.model.hex(), self.words.pattern, *self.words.symbols]

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    ids = io.BytesIO()
    ids.writelines(map(self._ids.__getitem__, self.words.cut(text)))  # b''.join would take 80 bytes a word meanwhile
    return np.frombuffer(ids.getbuffer(), np.int32)

  def save(self, directory: Path) -> None:
    write(directory, {'kind': self.kind, 'words': self.words.pattern, 'symbols': list(self.words.symbols)})
    (directory / MODEL).write_bytes(self.model)

  def save_hugging_face(self, directory: Path) -> None:
    for symbol in self.words.symbols:
      if not symbol.isascii() and set(symbol) <= set(ALPHABET):
        raise UserError('symbol', symbol, "for Hugging Face's files, symbols of ASCII or with a character that is no byte's in GPT-2's "
                        'alphabet: the tokenizers package would read this one as bytes')
    processor = self._ids.processor
    scores = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(SPECIALS, self.vocab_size)]
    export.write_tokenizer(directory, export.subwords(self.kind, scores, self.words.pattern, self.words.symbols))
