"""Tokenizers: text to ids and back, exactly, whatever the text."""

import abc
import codecs
import collections
import functools
import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from gptjax.config import TokenizerConfig, UserError
from gptjax.data.documents import Document
from gptjax.data.progress import announce

_FILE = 'tokenizer.json'
_MODEL = 'tokenizer.model'
_SPECIALS = 4


class Tokenizer(abc.ABC):
  """Turns text into ids and ids into text; `decode(encode(text)) == text` for any text that can be written as UTF-8.

  Text never becomes a special id, however much it looks like one. What an id stands for is a string of bytes, because
  an id may hold only a part of a character.

  Args:
    pieces: UTF-8 bytes of each id; b'' for the special ones, which come first.
  """

  pad_id = 0
  bos_id = 1
  eos_id = 2
  unk_id = 3

  def __init__(self, pieces: Sequence[bytes]):
    self.pieces = tuple(pieces)

  @property
  def vocab_size(self) -> int:
    """Count of ids, special ones included."""
    return len(self.pieces)

  @abc.abstractmethod
  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    """Ids of a text as int32 [n], no special ones added.

    Args:
      text: any text.
      source: what an error calls the text, such as the file it is from.

    Raises:
      UserError: the text cannot be encoded; the error names the character and its place.
    """

  def decode(self, ids: Iterable[int]) -> str:
    """Text of ids; special ids give nothing, bytes that are not UTF-8 give U+FFFD."""
    return b''.join(self.pieces[i] for i in ids).decode('utf-8', errors='replace')

  @abc.abstractmethod
  def save(self, directory: Path) -> None:
    """Writes all that `load_tokenizer` needs into a folder, as JSON and, for SentencePiece, its .model file."""


class TextStream:
  """Text of ids that arrive a few at a time; all pieces together are the `decode` of all ids.

  A character whose bytes have not all arrived is held back until they have.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._pieces = tokenizer.pieces
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def push(self, ids: Iterable[int]) -> str:
    """Text that these ids complete."""
    return self._decoder.decode(b''.join(self._pieces[i] for i in ids))

  def finish(self) -> str:
    """What was held back: U+FFFD if the last character is incomplete."""
    return self._decoder.decode(b'', final=True)


class ByteTokenizer(Tokenizer):
  """One id for each byte of the UTF-8 text."""

  def __init__(self):
    super().__init__([b''] * _SPECIALS + [bytes([byte]) for byte in range(256)])

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    return np.frombuffer(_utf8(text, source), np.uint8).astype(np.int32) + _SPECIALS

  def save(self, directory: Path) -> None:
    _write(directory, {'kind': 'bytes'})


class CharTokenizer(Tokenizer):
  """One id for each character of a given set, in the order of code points."""

  def __init__(self, characters: str):
    self.characters = ''.join(sorted(characters))
    super().__init__([b''] * _SPECIALS + [character.encode() for character in self.characters])
    self._codes = np.frombuffer(self.characters.encode('utf-32-le'), '<u4')

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    _utf8(text, source)
    codes = np.frombuffer(text.encode('utf-32-le'), '<u4')
    ids = np.searchsorted(self._codes, codes)
    unseen = self._codes[np.minimum(ids, len(self._codes) - 1)] != codes
    if unseen.any():
      place = int(unseen.argmax())
      raise UserError(f'{source}, character {place}', text[place],
                      f'one of the {len(self.characters)} characters that the tokenizer was made from')
    return (ids + _SPECIALS).astype(np.int32)

  def save(self, directory: Path) -> None:
    _write(directory, {'kind': 'chars', 'characters': self.characters})


WORDS = r'[^\w\n]?[^\W\d]{1,64}|\d| ?[^\w\s]{1,64}(?:\n+ *)?|\s*\n *|\s+(?!\S)|\s'
r"""The words whose borders no SentencePiece piece crosses: letters with the space or sign before them; a digit; signs
with the line ends and the indent after them; line ends and indents; spaces but the last, which goes with the next word.
Of 4,096 ids trained on Python's standard library, each then holds 19 % more bytes than under SentencePiece's own rule.
The 64 bounds what a text without spaces costs."""

_TRAINING_CHARACTERS = 50_000_000
"""Most that SentencePiece learns from; counting the words of so many takes some 5 seconds."""


def _byte_alphabet() -> str:
  """A printable character for each byte, GPT-2's choice: itself where it has one, else the next free from U+0100."""
  printable = {*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)}
  others = itertools.count(256)
  return ''.join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


_ALPHABET = _byte_alphabet()
_TO_ALPHABET = dict(enumerate(_ALPHABET))
_TO_BYTE = {character: byte for byte, character in enumerate(_ALPHABET)}


class SentencePieceTokenizer(Tokenizer):
  """Pieces of words, learned with SentencePiece: BPE (arXiv:1508.07909) or unigram (arXiv:1804.10959).

  SentencePiece sees the UTF-8 bytes of a word as characters of an alphabet of 256 (as GPT-2 does), all of them pieces.
  So every text has ids, and nothing in it (a space, a NUL, SentencePiece's own U+2581) means anything special.

  Args:
    kind: 'bpe' or 'unigram'.
    model: what SentencePiece saves.
    words: the regular expression that cuts text into words.
  """

  def __init__(self, kind: str, model: bytes, words: str = WORDS):
    self.kind = kind
    self.model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self._words = re.compile(words)
    # Most of a text is words seen before. Bounded, or the words of a large corpus would fill the memory.
    self._ids_of_word = functools.lru_cache(maxsize=2**17)(self._encode_word)
    pieces = map(self._processor.id_to_piece, range(_SPECIALS, self._processor.vocab_size()))
    super().__init__([b''] * _SPECIALS + [bytes(_TO_BYTE[character] for character in piece) for piece in pieces])

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    _utf8(text, source)
    words = map(re.Match.group, self._words.finditer(text))  # findall's list would be far larger than the text
    return np.fromiter(itertools.chain.from_iterable(map(self._ids_of_word, words)), np.int32)

  def _encode_word(self, word: str) -> list[int]:
    return self._processor.encode(_in_alphabet(word))

  def save(self, directory: Path) -> None:
    _write(directory, {'kind': self.kind, 'words': self._words.pattern})
    (directory / _MODEL).write_bytes(self.model)


def _in_alphabet(word: str) -> str:
  return word.encode().decode('latin-1').translate(_TO_ALPHABET)


def train_tokenizer(config: TokenizerConfig, documents: Sequence[Document]) -> Tokenizer:
  """Makes a tokenizer from documents, the same one from the same documents every time.

  Characters need every document that will ever be encoded, validation included; the other kinds encode any text.

  Raises:
    UserError: the documents do not have as many different pieces as the config asks for.
  """
  match config.kind:
    case 'bytes':
      return ByteTokenizer()
    case 'chars':
      characters: set[str] = set()
      for document in documents:
        characters.update(document.text)
      return CharTokenizer(''.join(characters))
    case 'bpe' | 'unigram':
      return _train_sentencepiece(config, documents)


def _train_sentencepiece(config: TokenizerConfig, documents: Sequence[Document]) -> Tokenizer:
  announce(f'training the {config.kind} tokenizer with {config.vocab_size:,} ids')
  counts: collections.Counter[str] = collections.Counter()
  for text in _sample(documents):
    counts.update(map(re.Match.group, re.finditer(WORDS, text)))
  # A line a word, with its count: each byte's character once, so that it becomes a piece whatever the documents.
  words = itertools.chain(_ALPHABET, map(_in_alphabet, counts))
  lines = (f'{word}\t{count}' for word, count in zip(words, itertools.chain([1] * 256, counts.values()), strict=True))
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, input_format='tsv', model_writer=model, model_type=config.kind,
        vocab_size=config.vocab_size, pad_id=Tokenizer.pad_id, bos_id=Tokenizer.bos_id, eos_id=Tokenizer.eos_id,
        unk_id=Tokenizer.unk_id, character_coverage=1.0, normalization_rule_name='identity', add_dummy_prefix=False,
        split_by_unicode_script=False, split_by_whitespace=False, max_sentencepiece_length=32,
        seed_sentencepiece_size=25 * config.vocab_size, minloglevel=2,
        num_threads=8)  # a number of ours, not the machine's: unigram's result depends on it
  except RuntimeError as error:
    highest = re.search(r'Vocabulary size too high .* <= (\d+)', str(error))
    if not highest:
      raise
    raise UserError('data.tokenizer.vocab_size', config.vocab_size, f'at most {highest[1]} for these documents, or '
                    "data.tokenizer.kind 'chars' or 'bytes'") from None
  return SentencePieceTokenizer(config.kind, model.getvalue())


def _sample(documents: Sequence[Document]) -> Iterator[str]:
  """Texts in a fixed but shuffled order, up to a total of characters that takes seconds to learn from."""
  left = _TRAINING_CHARACTERS
  for index in sorted(range(len(documents)), key=lambda index: hashlib.sha256(index.to_bytes(8)).digest()):
    if left <= 0:
      return
    text = documents[index].text[:left]
    left -= len(text)
    yield text


def load_tokenizer(directory: Path) -> Tokenizer:
  """Reads what `Tokenizer.save` wrote.

  Raises:
    UserError: the folder has no tokenizer.
  """
  try:
    saved = json.loads((Path(directory) / _FILE).read_text(encoding='utf-8'))
  except FileNotFoundError:
    raise UserError('tokenizer', str(directory), f'a folder with {_FILE}') from None
  match saved['kind']:
    case 'bytes':
      return ByteTokenizer()
    case 'chars':
      return CharTokenizer(saved['characters'])
    case kind:
      return SentencePieceTokenizer(kind, (Path(directory) / _MODEL).read_bytes(), saved['words'])


def _write(directory: Path, saved: dict[str, str]) -> None:
  directory.mkdir(parents=True, exist_ok=True)
  (directory / _FILE).write_text(json.dumps(saved) + '\n', encoding='utf-8')


def _utf8(text: str, source: str) -> bytes:
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{source}, character {error.start}', text[error.start],
                    'characters that UTF-8 can write (no lone surrogates)') from None
