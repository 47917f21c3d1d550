"""What every tokenizer does, and the two that need no training: bytes and characters."""

import abc
import codecs
import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizers import export

FILE = 'gptjax_tokenizer.json'
"""What `Tokenizer.save` writes into a folder, among other files. (Hugging Face's is tokenizer.json.)"""
SPECIALS = 3
"""Special ids of a tokenizer of ours."""


class Tokenizer(abc.ABC):
  """Turns text into ids and ids into text; `decode(encode(text)) == text` for any text that can be written as UTF-8.

  Published tokenizers (PublishedTokenizer) may lose a little; they say what.

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
  prefix: bytes = b''
  """what `encode` puts before a text and `decode` takes away: a space where SentencePiece writes one before every text"""

  def __init__(self, pieces: Sequence[bytes]):
    self.pieces = tuple(pieces)

  @property
  def vocab_size(self) -> int:
    """Count of ids, special ones included."""
    return len(self.pieces)

  @property
  def start_ids(self) -> tuple[int, ...]:
    """Ids that a text has in front where it is a model's prompt: bos_id, but for published tokenizers that put none there."""
    return (self.bos_id,)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end a text, or a turn of a conversation; eos_id is one of them."""
    return (self.eos_id,)

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
    return b''.join(self.pieces[i] for i in ids).removeprefix(self.prefix).decode('utf-8', errors='replace')

  def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: object) -> np.ndarray:
    """Ids of a conversation as int32 [n], special ones included, as the tokenizer's chat template writes it.

    Only the template makes special ids; what looks like one in a message is text.

    Args:
      messages: {'role': ..., 'content': ...} each, in order; the template says which roles there are.
      add_generation_prompt: end with what comes before the assistant's answer.
      options: what else the template asks for, such as enable_thinking.

    Raises:
      UserError: the tokenizer has no template, or the template refuses the messages.
    """
    raise UserError('tokenizer', self.kind, 'one with a chat template (chat_template.jinja, or chat_template in tokenizer_config.json)')

  @abc.abstractmethod
  def save(self, directory: Path) -> None:
    """Writes all that `load_tokenizer` needs into a folder: JSON and the files that the tokenizer is made of, if it is of files."""

  @abc.abstractmethod
  def save_hugging_face(self, directory: Path) -> None:
    """Writes files with which transformers' `AutoTokenizer.from_pretrained(directory)` gives the same ids and texts.

    Which ids a model begins and stops with is said by config.json and generation_config.json, too; those are the model's.

    Raises:
      UserError: those files cannot say what this tokenizer does.
    """


class TextStream:
  """Text of ids that arrive a few at a time; all pieces together are the `decode` of all ids.

  A character whose bytes have not all arrived is held back until they have.

  Args:
    tokenizer: of the ids.
    continues: whether text came before, so that a space in front is one.
  """

  def __init__(self, tokenizer: Tokenizer, continues: bool = False):
    self._pieces = tokenizer.pieces
    self._prefix = b'' if continues else tokenizer.prefix
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def push(self, ids: Iterable[int]) -> str:
    """Text that these ids complete."""
    data = b''.join(self._pieces[i] for i in ids)
    if data:
      data, self._prefix = data.removeprefix(self._prefix), b''
    return self._decoder.decode(data)

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

  def save_hugging_face(self, directory: Path) -> None:
    export.write_tokenizer(directory, export.bytes_alone(ALPHABET))


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

  def save_hugging_face(self, directory: Path) -> None:
    export.write_tokenizer(directory, export.characters_alone(self.characters))


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
