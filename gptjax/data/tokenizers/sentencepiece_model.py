"""Tokenizers of a SentencePiece tokenizer.model that others trained: Llama 2, Mistral, Gemma."""

import re

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gptjax.config import UserError
from gptjax.data.tokenizers import chat
from gptjax.data.tokenizers.published import MODEL, Published, PublishedTokenizer
from gptjax.data.tokenizers.tokenizer import utf8


class SentencePieceModel(PublishedTokenizer):
  """What the sentencepiece package makes of a tokenizer.model, and the special tokens that the folder adds to it.

  In a conversation the text after a special token gets SentencePiece's space in front only where tokenizer_config.json
  says `"legacy": true`.

  Args:
    published: the files.

  Raises:
    UserError: the file is damaged, or the model has no bytes to fall back to.
  """

  kind = 'sentencepiece'

  def __init__(self, published: Published):
    path = f'{published.place}/{MODEL}'
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=published.files[MODEL])
    except RuntimeError as error:
      raise UserError(path, f'{len(published.files[MODEL])} bytes', f'a model that SentencePiece reads ({error})') from None
    model, count = self._model, self._model.vocab_size()
    texts = list(map(model.id_to_piece, range(count)))
    if sum(map(model.is_byte, range(count))) != 256:
      raise UserError(path, 'no token for some bytes', 'a model trained with byte_fallback')
    more = {i: text for i, text in sorted(published.added.items()) if i >= count}
    if list(more) != list(range(count, count + len(more))):
      raise UserError(f'{published.place}: added tokens', list(more)[0], f'{count}, the first id after those of {MODEL}, and so on')
    control = {i: texts[i] for i in range(count) if model.is_control(i) or model.is_unknown(i)}
    ids = dict(zip([*texts, *more.values()], range(count + len(more))))
    own = {'bos_token': model.bos_id(), 'eos_token': model.eos_id(), 'pad_token': model.pad_id(), 'unk_token': model.unk_id()}
    tokens = {name: texts[i] for name, i in own.items() if i >= 0} | published.tokens
    self.prefix = b' ' if model.normalize('a').startswith('▁') else b''
    added = {i: text for i, text in published.added.items() if i >= count or texts[i] == text}
    super().__init__(published, [*map(self._bytes, range(count)), *(b'' for _ in more)], tokens, control | added, ids.get)
    # SentencePiece would find these in a text by itself.
    self._found = chat.special_pattern(text for i, text in added.items() if i < count and i not in control)
    self._inside = _without_prefix(published.files[MODEL])

  def _bytes(self, i: int) -> bytes:
    text = self._model.id_to_piece(i)
    return bytes.fromhex(text[3:5]) if self._model.is_byte(i) else text.replace('▁', ' ').encode()

  @property
  def start_ids(self) -> tuple[int, ...]:
    return (self.bos_id,) if self.published.config.get('add_bos_token', False) else ()

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    return np.array(self._text(text, self._model), np.int32)

  def _text(self, text: str, model: sentencepiece.SentencePieceProcessor) -> list[int]:
    places = [found.start() + 1 for found in re.finditer(f'(?={self._found.pattern})', text)] if self._found else []
    ids = model.encode(text[:places[0]] if places else text)
    for start, stop in zip(places, [*places[1:], len(text)]):
      ids += self._inside.encode(text[start:stop])
    return ids

  def _section(self, text: str, first: bool) -> list[int]:
    return self._text(text, self._model if first or self.published.config.get('legacy', False) else self._inside)


def _without_prefix(model: bytes) -> sentencepiece.SentencePieceProcessor:
  """The same model for a text that goes on."""
  proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # it is made at import
  proto.normalizer_spec.add_dummy_prefix = False
  return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
