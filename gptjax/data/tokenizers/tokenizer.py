"""The interface of tokenizers, and the two that need no training: bytes and characters."""

import abc
import codecs
import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.sources.source import ASSISTANT
from gptjax.data.tokenizers import export

FILE = 'gptjax_tokenizer.json'  # written by `Tokenizer.save`, among other files
SPECIALS = 3  # special ids of our own tokenizers


def in_parts(parts: Sequence[str], encode: Callable[[str], np.ndarray], has_prefix: bool) -> list[np.ndarray]:
  """The ids of consecutive parts of a text. A part has the ids that it has in the text, if those before it are the same without it, and
  else the ids that it has alone. So the ids before a part are those of a prompt that ends there. `has_prefix`: as Tokenizer.prefix."""
  def alone(part: str) -> np.ndarray:
    line_end, after = encode('\n'), encode(f'\n{part}')  # after a line end, the part has no prefix
    return after[len(line_end):] if has_prefix and np.array_equal(after[:len(line_end)], line_end) else encode(part)

  found: list[np.ndarray] = []
  text, before = '', np.empty(0, np.int32)
  for part in parts:
    text += part
    ids = encode(text)
    if not np.array_equal(ids[:len(before)], before):
      ids = np.concatenate([before, alone(part)])
    found.append(ids[len(before):])
    before = ids
  return found


def _heading(role: str) -> str:
  return f'### {role.capitalize()}:\n'


HEADINGS = '\n'.join(map(_heading, ('system', 'user', ASSISTANT)))
"""All headings of conversations without a template."""


class Tokenizer(abc.ABC):
  """Converts between text and ids; `decode(encode(text)) == text` for any valid Unicode (exceptions: PublishedTokenizer).

  Text never becomes a special id, even if it looks like one. `pieces` are the UTF-8 bytes of each id, which may be only a part of a
  character; b'' for special ids.
  """

  kind: str
  """name of the class in a saved folder"""
  pad_id: int = 0
  bos_id: int = 1
  eos_id: int = 1  # one separator: a store's stream is circular, so a document's end is the next one's start
  unk_id: int | None = 2
  """never produced by `encode`; None: the tokenizer has none"""
  prefix: bytes = b''
  """prepended by `encode` and removed by `decode`: a space where SentencePiece adds one before every text"""
  plain_chat: bool = False
  """whether conversations are written below headings such as '### User:', with eos_id after each answer"""
  _template: Any = None
  """the chat template"""
  saved: Mapping[str, object] = {}
  """what FILE has beside the kind"""

  def __init__(self, pieces: Sequence[bytes]):
    self.pieces = tuple(pieces)

  @property
  def vocab_size(self) -> int:
    """Number of ids, including special ones."""
    return len(self.pieces)

  @functools.cached_property
  def start_ids(self) -> tuple[int, ...]:
    """Ids that start a prompt: bos_id, or nothing for published tokenizers that add none."""
    return (self.bos_id,)

  @functools.cached_property
  def stop_ids(self) -> tuple[int, ...]:
    """Ids that end a text or a turn of a conversation, eos_id included."""
    return (self.eos_id,)

  @functools.cached_property
  def largest_id(self) -> int:
    """The largest id that a text, the ends of a document or a conversation has; a model may lack the special ids after it."""
    ends = {self.bos_id, *self.start_ids, *self.stop_ids, *self.template_ids}
    return max(i for i, piece in enumerate(self.pieces) if piece or i in ends)

  @property
  def template_ids(self) -> Iterable[int]:
    """Special ids that the chat template writes."""
    return ()

  @functools.cached_property
  def sha256(self) -> str:
    """Hex digest of everything that ids depend on; saving and loading preserves it."""
    digest = hashlib.sha256(json.dumps([self.kind, self._rules()]).encode())
    for piece in self.pieces:
      digest.update(len(piece).to_bytes(8) + piece)
    return digest.hexdigest()

  def _rules(self) -> list[str]:
    """Descriptions of everything else that ids depend on, besides kind and pieces."""
    return []

  @abc.abstractmethod
  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    """Encodes a text to int32 ids [n] without special ids. Raises a UserError that names a bad character's place in `source`."""

  def decode(self, ids: Iterable[int]) -> str:
    """Decodes ids; special ids have no text, and invalid UTF-8 becomes U+FFFD."""
    return b''.join(self.pieces[i] for i in ids).removeprefix(self.prefix).decode('utf-8', errors='replace')

  def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: object) -> np.ndarray:
    """Encodes a conversation with the tokenizer's chat template to int32 ids [n]. Only the template produces special ids.

    Messages are {'role': ..., 'content': ...}; the template defines the roles. `add_generation_prompt` appends the start of the
    answer; `options` are other variables of the template, such as enable_thinking. Raises a UserError if the tokenizer has no
    template, or the template rejects the messages.
    """
    parts, rest = self._plain_parts(messages)
    rest += _heading(ASSISTANT) if add_generation_prompt else ''
    return np.concatenate([*(part for part, _ in parts), self.encode(rest, 'messages')]).astype(np.int32)

  def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[np.ndarray, int | None]]:
    """The ids of a conversation in parts, each with the number of the message of the assistant that it is, up to the end of the turn, or
    None. Raises a UserError as `chat` does, and where the end of an answer is not an id that ends a turn."""
    parts, rest = self._plain_parts(messages)
    return [*parts, (self.encode(rest, 'messages'), None)]

  def _plain_parts(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[np.ndarray, int | None]], str]:
    """The parts of a conversation below headings up to the end of its last answer, and the text after it."""
    if not self.plain_chat:
      raise UserError('tokenizer', self.kind, 'one with a chat template (chat_template.jinja, or chat_template in tokenizer_config.json), '
                      'or that of a run with data.source.chat=plain')
    if not all(isinstance(message, Mapping) and isinstance(message.get(key), str) for message in messages for key in ('role', 'content')):
      raise UserError('messages', messages, 'messages with a role and a content, which are texts')
    roles = [message['role'] for message in messages]
    spoken = roles[roles[:1] == ['system']:]
    if not spoken or spoken != [('user', ASSISTANT)[at % 2] for at in range(len(spoken))]:
      raise UserError('messages', roles, 'user and assistant in turn, perhaps after one message of the system')
    parts: list[tuple[np.ndarray, int | None]] = [(np.array(self.start_ids, np.int32), None)]
    text = ''
    for number, message in enumerate(messages):
      text += _heading(message['role'])
      if message['role'] == ASSISTANT:
        before, answer = self.encode_parts([text, message['content']], 'messages')
        parts += [(before, None), (np.append(answer, self.eos_id), number)]
        text = '\n\n' if number + 1 < len(messages) else ''
      else:
        text += f'{message["content"]}\n\n'
    return parts, text

  def encode_parts(self, parts: Sequence[str], source: str = 'text') -> list[np.ndarray]:
    """The ids of consecutive parts of a text; see `in_parts`."""
    return in_parts(parts, lambda text: self.encode(text, source), bool(self.prefix))

  def for_chat(self, style: str) -> 'Tokenizer':
    """The tokenizer of a source with this data.source.chat. Raises a UserError if it lacks the template."""
    if style == 'template' and not self._template:
      raise UserError('data.source.chat', style, f'plain, or in data.tokenizer.path a tokenizer with a chat template (kind {self.kind!r})')
    return self.with_plain_chat(style == 'plain') if style and (style == 'plain') != self.plain_chat else self

  def with_plain_chat(self, plain: bool = True) -> 'Tokenizer':
    """The same tokenizer, whose conversations are written below headings, or by its template."""
    other = copy.copy(self)
    other.plain_chat = plain
    return other

  def save(self, directory: Path) -> None:
    """Writes what `load_tokenizer` needs to a folder, created if necessary."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / FILE).write_text(json.dumps({'kind': self.kind, **self.saved, **({'plain_chat': True} if self.plain_chat else {})}) + '\n', encoding='utf-8')

  @abc.abstractmethod
  def save_hugging_face(self, directory: Path) -> None:
    """Writes files from which transformers loads an equal tokenizer; raises a UserError if their format cannot represent it."""


class TextStream:
  """Decodes ids that arrive a few at a time, up to the last complete character; the results together equal `decode` of all ids.

  `continues`: other text precedes, so that the tokenizer's prefix is kept.
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
    """The rest: U+FFFD if the last character is incomplete."""
    return self._decoder.decode(b'', final=True)


class ByteTokenizer(Tokenizer):
  """One id per byte of UTF-8."""

  kind = 'bytes'

  def __init__(self):
    super().__init__([b''] * SPECIALS + [bytes([byte]) for byte in range(256)])

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    return np.frombuffer(utf8(text, source), np.uint8).astype(np.int32) + SPECIALS

  def save_hugging_face(self, directory: Path) -> None:
    export.write_tokenizer(directory, export.byte_tokenizer(ALPHABET))


class CharTokenizer(Tokenizer):
  """One id per character of a given set, in code-point order."""

  kind = 'chars'

  def __init__(self, characters: str):
    self.characters = ''.join(sorted(characters))
    self.saved = {'characters': self.characters}
    super().__init__([b''] * SPECIALS + [character.encode() for character in self.characters])
    self._codes = np.frombuffer(self.characters.encode('utf-32-le'), '<u4')

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    codes = np.frombuffer(text.encode('utf-32-le'), '<u4')
    ids = np.searchsorted(self._codes, codes)
    unseen = self._codes[np.minimum(ids, len(self._codes) - 1)] != codes
    if unseen.any():
      position = int(unseen.argmax())
      raise UserError(f'{source}, character {position}', text[position],
                      f"one of the {len(self.characters)} characters of the tokenizer's training text")
    return (ids + SPECIALS).astype(np.int32)

  def save_hugging_face(self, directory: Path) -> None:
    export.write_tokenizer(directory, export.char_tokenizer(self.characters))


_PRINTABLE = {*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)}
_OTHERS = itertools.count(256)
ALPHABET = ''.join(chr(byte if byte in _PRINTABLE else next(_OTHERS)) for byte in range(256))
"""GPT-2's printable character for each byte: the byte's own, or the next one from U+0100 if that is not printable."""
_TO_BYTE = {character: byte for byte, character in enumerate(ALPHABET)}


def to_alphabet(data: bytes) -> str:
  """Represents each byte by its character of the alphabet."""
  return data.decode('latin-1').translate(ALPHABET)


def from_alphabet(characters: str) -> bytes:
  """Inverse of `to_alphabet`; KeyError for other characters."""
  return bytes(_TO_BYTE[character] for character in characters)


def utf8(text: str, source: str) -> bytes:
  """Encodes to UTF-8; a lone surrogate raises a UserError with its position."""
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise UserError(f'{source}, character {error.start}', text[error.start],
                    'characters that UTF-8 can represent (no lone surrogates)') from None
