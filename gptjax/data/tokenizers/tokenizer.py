"""What every tokenizer does, and the two that need no training: bytes and characters."""

import abc
import codecs
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gptjax.config import UserError

FILE = 'tokenizer.json'
"""What `load_tokenizer` looks for in a folder."""
SPECIALS = 3
"""Special ids of a tokenizer of ours."""


class Tokenizer(abc.ABC):
  """Turns text into ids and ids into text; `decode(encode(text)) == text` for any text that can be written as UTF-8.

  Text never becomes a special id, however much it looks like one. What an id stands for is a string of bytes, because
  an id may hold only a part of a character.

  Args:
    pieces: UTF-8 bytes of each id; b'' for the special ones.
  """

  kind: str
  """what its folder calls it"""
  pad_id: int = 0
  bos_id: int = 1
  eos_id: int = 1  # one separator: the stream of a store is circular, a document's end is the next one's beginning
  unk_id: int | None = 2
  """never made of text; None: the tokenizer has none"""

  def __init__(self, pieces: Sequence[bytes]):
    self.pieces = tuple(pieces)

  @property
  def vocab_size(self) -> int:
    """Count of ids, special ones included."""
    return len(self.pieces)

  @functools.cached_property
  def sha256(self) -> str:
    """Hex digest of all that its ids depend on: equal for a tokenizer and what is saved and loaded of it."""
    whole = hashlib.sha256(json.dumps([self.kind, self._rules()]).encode())
    for piece in self.pieces:
      whole.update(len(piece).to_bytes(8) + piece)
    return whole.hexdigest()

  def _rules(self) -> list[str]:
    """What the ids of a text depend on beside kind and pieces."""
    return []

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
    """Writes all that `load_tokenizer` needs into a folder: JSON and, of SentencePiece or GPT-2, the files it is made of."""


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

  kind = 'bytes'

  def __init__(self):
    super().__init__([b''] * SPECIALS + [bytes([byte]) for byte in range(256)])

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    return np.frombuffer(utf8(text, source), np.uint8).astype(np.int32) + SPECIALS

  def save(self, directory: Path) -> None:
    write(directory, {'kind': self.kind})


class CharTokenizer(Tokenizer):
  """One id for each character of a given set, in the order of code points."""

  kind = 'chars'

  def __init__(self, characters: str):
    self.characters = ''.join(sorted(characters))
    super().__init__([b''] * SPECIALS + [character.encode() for character in self.characters])
    self._codes = np.frombuffer(self.characters.encode('utf-32-le'), '<u4')

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    codes = np.frombuffer(text.encode('utf-32-le'), '<u4')
    ids = np.searchsorted(self._codes, codes)
    unseen = self._codes[np.minimum(ids, len(self._codes) - 1)] != codes
    if unseen.any():
      place = int(unseen.argmax())
      raise UserError(f'{source}, character {place}', text[place],
                      f'one of the {len(self.characters)} characters that the tokenizer was made from')
    return (ids + SPECIALS).astype(np.int32)

  def save(self, directory: Path) -> None:
    write(directory, {'kind': self.kind, 'characters': self.characters})


def _byte_alphabet() -> str:
  """A printable character for each byte, GPT-2's choice: itself where it has one, else the next free from U+0100."""
  printable = {*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)}
  others = itertools.count(256)
  return ''.join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


ALPHABET = _byte_alphabet()
_TO_ALPHABET = dict(enumerate(ALPHABET))
_TO_BYTE = {character: byte for byte, character in enumerate(ALPHABET)}


def in_alphabet(text: str) -> str:
  """The UTF-8 bytes of a text, each as its character of the alphabet."""
  return text.encode().decode('latin-1').translate(_TO_ALPHABET)


def in_bytes(characters: str) -> bytes:
  """The bytes that characters of the alphabet stand for; KeyError for any other character."""
  return bytes(_TO_BYTE[character] for character in characters)


def write(directory: Path, saved: dict[str, object]) -> None:
  """Writes a tokenizer's own JSON file into a folder, which is made if need be."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / FILE).write_text(json.dumps(saved) + '\n', encoding='utf-8')


def utf8(text: str, source: str) -> bytes:
  """The text's UTF-8 bytes, or a UserError that names the lone surrogate and its place."""
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{source}, character {error.start}', text[error.start],
                    'characters that UTF-8 can write (no lone surrogates)') from None
