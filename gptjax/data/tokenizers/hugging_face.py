"""Tokenizers of Hugging Face's tokenizer.json: byte-level BPE (GPT-2, Qwen, Llama 3, OLMo 2) and that with ▁ for a space."""

import functools
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizers import chat
from gptjax.data.tokenizers.published import DESCRIPTION, Published, PublishedTokenizer
from gptjax.data.tokenizers.tokenizer import in_bytes, utf8


class HuggingFaceTokenizer(PublishedTokenizer):
  """What the `tokenizers` package makes of a tokenizer.json, without the special ids that it would put around a text.

  Where Metaspace puts the space before a text, a space that the text itself begins with is lost, as it is in transformers.

  Args:
    published: the files.

  Raises:
    UserError: the tokenizers package is not there, the file is damaged, or it describes something else than BPE or unigram
      of bytes or with bytes to fall back to.
  """

  kind = 'hugging_face'

  def __init__(self, published: Published):
    described = published.json(DESCRIPTION)
    self._backend = _backend(published)
    self._backend.encode_special_tokens = True  # text is text
    tokens = _tokens_by_id(self._backend.get_vocab(with_added_tokens=True), published)
    named = _unknown(described['model']) | published.tokens
    ids = dict(zip(tokens, range(len(tokens))))
    bytes_of, self.prefix = _reading(described.get('decoder'), published)
    specials = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
    super().__init__(published, list(map(bytes_of, tokens)), named, specials, ids.get)
    if self.unk_id is None and not {bytes([byte]) for byte in range(256)} <= set(self.pieces):
      raise UserError(f'{published.place}/{DESCRIPTION}', 'no token for some bytes', 'all 256 bytes, or an unk_token')

  @functools.cached_property
  def _parsing(self) -> Any:
    return _backend(self.published)

  @functools.cached_property
  def start_ids(self) -> tuple[int, ...]:
    with_them, alone = (self._parsing.encode('a', add_special_tokens=add).ids for add in (True, False))
    return tuple(itertools.takewhile(lambda i: i != alone[0], with_them))  # of a prompt nothing is wanted behind it

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    found = self._backend.encode(text, add_special_tokens=False)
    ids = np.array(found.ids, np.int32)
    if self.unk_id is not None and (unknown := ids == self.unk_id).any():
      place = found.offsets[int(unknown.argmax())][0]
      raise UserError(f'{source}, character {place}', text[place], 'characters that the tokenizer has')
    return ids

  def _parsed(self, text: str) -> list[int]:
    # What a message has of special tokens is known by its mark; only then is the text cut here and not by the package.
    return super()._parsed(text) if chat.MARK in text else self._parsing.encode(text, add_special_tokens=False).ids


def _backend(published: Published) -> Any:
  try:
    import tokenizers  # only now: whoever brings no such file need not have it
  except ImportError:
    raise UserError('tokenizer', DESCRIPTION, 'a machine with the tokenizers package: pip install tokenizers') from None
  path = f'{published.place}/{DESCRIPTION}'
  try:
    backend = tokenizers.Tokenizer.from_buffer(published.files[DESCRIPTION])
  except Exception as error:  # the package has no class of its own
    raise UserError(path, type(error).__name__, f'a file that the tokenizers package reads ({error})') from None
  if (kind := type(backend.model).__name__) not in ('BPE', 'Unigram'):
    raise UserError(f'{path}: model', kind, 'BPE or Unigram')
  backend.no_truncation()
  backend.no_padding()
  # A token that the config calls special is so, as in transformers, though it may be one of the model's own.
  known = {token.content for token in backend.get_added_tokens_decoder().values()}
  vocab = backend.get_vocab()
  backend.add_special_tokens([text for text in dict.fromkeys(published.tokens.values()) if text not in known and text in vocab])
  return backend


def _unknown(model: Mapping[str, Any]) -> dict[str, str]:
  if isinstance(model.get('unk_id'), int):
    return {'unk_token': model['vocab'][model['unk_id']][0]}
  return {'unk_token': model['unk_token']} if model.get('unk_token') else {}


def _tokens_by_id(vocab: Mapping[str, int], published: Published) -> list[str]:
  tokens = {i: token for token, i in vocab.items()}
  for i in range(len(vocab)):
    if i not in tokens:
      raise UserError(f'{published.place}/{DESCRIPTION}, id {i}', None, f'a token for each of {len(vocab)} ids, and no two for one')
  return [tokens[i] for i in range(len(vocab))]


def _reading(decoder: Any, published: Published) -> tuple[Callable[[str], bytes], bytes]:
  """What gives the bytes of a token, and the prefix of texts."""
  steps: list[Callable[[str], str | bytes]] = []
  prefix = b''
  for step in decoder['decoders'] if decoder and decoder['type'] == 'Sequence' else [decoder]:
    match step:
      case {'type': 'ByteLevel'}:
        steps.append(_of_alphabet)
      case {'type': 'Replace', 'pattern': {'String': old}, 'content': new}:
        steps.append(operator.methodcaller('replace', old, new))
      case {'type': 'ByteFallback'}:
        steps.append(_of_number)
      case {'type': 'Metaspace', 'replacement': old}:
        steps.append(operator.methodcaller('replace', old, ' '))
        prefix = b'' if step.get('prepend_scheme') == 'never' or step.get('add_prefix_space') is False else b' '
      case {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}:
        prefix = b' '
      case {'type': 'Fuse'}:
        pass
      case _:
        raise UserError(f'{published.place}/{DESCRIPTION}: decoder', step and step.get('type'), 'ByteLevel, or a sequence of Replace, '
                        'ByteFallback, Fuse, Metaspace and one Strip on the left')

  def read(token: str) -> bytes:
    said: str | bytes = token
    for step in steps:
      said = step(said) if isinstance(said, str) else said
    return said.encode() if isinstance(said, str) else said
  return read, prefix


def _of_alphabet(token: str) -> bytes:
  try:
    return in_bytes(token)
  except KeyError:  # an added token is written as it is
    return token.encode()


def _of_number(token: str) -> str | bytes:
  """<0x0A> is a byte."""
  try:
    return bytes.fromhex(token[3:5]) if len(token) == 6 and token.startswith('<0x') and token.endswith('>') else token
  except ValueError:
    return token
