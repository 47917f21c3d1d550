"""Tokenizers in Hugging Face's tokenizer.json: byte-level BPE (GPT-2, Qwen, Llama 3, OLMo 2), or with ▁ for a space."""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tokenizers

from gptjax.config import UserError
from gptjax.data.tokenizers.published import DESCRIPTION, MARK, Published, PublishedTokenizer
from gptjax.data.tokenizers.tokenizer import ALPHABET, from_alphabet, utf8


class HuggingFaceTokenizer(PublishedTokenizer):
  """A tokenizer.json, encoded by the `tokenizers` package, without the special ids that it would put around a text.

  As in transformers, a space at the start of a text is lost where Metaspace prepends one. Raises a UserError if the file is
  damaged, or describes something other than byte-level BPE or unigram, or the same with byte fallback.
  """

  kind = 'hugging_face'

  def __init__(self, published: Published):
    description = published.json(DESCRIPTION)
    self._backend = _load(published)
    self._backend.encode_special_tokens = True  # text that looks like a special token is text
    vocab = self._backend.get_vocab(with_added_tokens=True)
    if missing := {*range(len(vocab))} - {*vocab.values()}:
      raise UserError(f'{published.location}/{DESCRIPTION}, id {min(missing)}', None, f'{len(vocab)} consecutive ids, each of one token')
    tokens = sorted(vocab, key=vocab.__getitem__)
    bytes_of, self.prefix = _byte_decoder(description.get('decoder'), published)
    special = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
    names = _unk_token(description['model']) | published.special_tokens
    super().__init__(published, list(map(bytes_of, tokens)), names, special, vocab.get)
    if self.unk_id is None and not {bytes([byte]) for byte in range(256)} <= set(self.pieces):
      raise UserError(f'{published.location}/{DESCRIPTION}', 'no token for some bytes', 'all 256 bytes, or an unk_token')

  @functools.cached_property
  def _template_backend(self) -> tokenizers.Tokenizer:
    """Encodes rendered chat templates, in which special tokens are recognized."""
    return _load(self.published)

  @functools.cached_property
  def start_ids(self) -> tuple[int, ...]:
    with_special, without = (self._template_backend.encode('a', add_special_tokens=add).ids for add in (True, False))
    return tuple(itertools.takewhile(lambda i: i != without[0], with_special))  # without ids that it appends

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    found = self._backend.encode(text, add_special_tokens=False)
    ids = np.array(found.ids, np.int32)
    if self.unk_id is not None and (unknown := ids == self.unk_id).any():
      position = found.offsets[int(unknown.argmax())][0]
      raise UserError(f'{source}, character {position}', text[position], "characters in the tokenizer's vocabulary")
    return ids

  def _encode_rendered(self, text: str) -> list[int]:
    # Only where messages contain special tokens, which are marked, is the text split here instead of by the package.
    if MARK in text:
      return super()._encode_rendered(text)
    return self._template_backend.encode(text, add_special_tokens=False).ids


def _load(published: Published) -> tokenizers.Tokenizer:
  path = f'{published.location}/{DESCRIPTION}'
  try:
    backend = tokenizers.Tokenizer.from_buffer(published.files[DESCRIPTION])
  except Exception as error:  # the package has no exception class of its own
    raise UserError(path, type(error).__name__, f'a file that the tokenizers package can read ({error})') from None
  if (kind := type(backend.model).__name__) not in ('BPE', 'Unigram'):
    raise UserError(f'{path}: model', kind, 'BPE or Unigram')
  backend.no_truncation()
  backend.no_padding()
  # As in transformers, the config may declare tokens of the model's vocabulary special.
  known = {token.content for token in backend.get_added_tokens_decoder().values()}
  vocab = backend.get_vocab()
  special = dict.fromkeys(published.special_tokens.values())
  backend.add_special_tokens([text for text in special if text not in known and text in vocab])
  return backend


def _unk_token(model: Mapping[str, Any]) -> dict[str, str]:
  if isinstance(model.get('unk_id'), int):
    return {'unk_token': model['vocab'][model['unk_id']][0]}
  return {'unk_token': model['unk_token']} if model.get('unk_token') else {}


def _byte_decoder(decoder: Any, published: Published) -> tuple[Callable[[str], bytes], bytes]:
  """A function from tokens to their bytes, and the prefix that decoding removes from texts."""
  replaced: list[tuple[str, str]] = []
  kinds, prefix, alphabet = set(), b'', {*ALPHABET}
  for step in decoder['decoders'] if decoder and decoder['type'] == 'Sequence' else [decoder]:
    match step:
      case {'type': 'ByteLevel' | 'ByteFallback' | 'Fuse' as kind}:
        kinds.add(kind)
      case {'type': 'Replace', 'pattern': {'String': old}, 'content': new}:
        replaced.append((old, new))
      case {'type': 'Metaspace', 'replacement': old}:
        replaced.append((old, ' '))
        prefix = b'' if step.get('prepend_scheme') == 'never' or step.get('add_prefix_space') is False else b' '
      case {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}:
        prefix = b' '
      case _:
        raise UserError(f'{published.location}/{DESCRIPTION}: decoder', step and step.get('type'), 'ByteLevel, or a sequence of Replace, '
                        'ByteFallback, Fuse, Metaspace and one Strip on the left')

  def decode(token: str) -> bytes:
    for old, new in replaced:
      token = token.replace(old, new)
    if 'ByteLevel' in kinds and alphabet.issuperset(token):  # other tokens are added ones, which are plain text
      return from_alphabet(token)
    byte = re.fullmatch('<0x([0-9A-Fa-f]{2})>', token) if 'ByteFallback' in kinds else None
    return bytes.fromhex(byte[1]) if byte else token.encode()

  return decode, prefix
