"""Published SentencePiece models, tokenizer.model: Llama 2, Mistral, Gemma."""

import re

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from gptjax.config import UserError
from gptjax.data.tokenizers.published import MODEL, Published, PublishedTokenizer, special_pattern
from gptjax.data.tokenizers.tokenizer import utf8


class SentencePieceModel(PublishedTokenizer):
  """A tokenizer.model, encoded by the sentencepiece package, and the special tokens that its folder adds.

  In a conversation, SentencePiece's space is prepended to the text after a special token only if tokenizer_config.json has
  `"legacy": true`. Raises a UserError if the file is damaged, or the model has no byte fallback.
  """

  kind = 'sentencepiece'

  def __init__(self, published: Published):
    path = f'{published.location}/{MODEL}'
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_proto=published.files[MODEL])
    except RuntimeError as error:
      raise UserError(path, f'{len(published.files[MODEL])} bytes', f'a model that SentencePiece can read ({error})') from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(published.files[MODEL])  # type: ignore[attr-defined]  # defined at import
    proto.normalizer_spec.add_dummy_prefix = False
    self._continuing = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())  # for text that follows other text
    model, count = self._model, self._model.vocab_size()
    texts = list(map(model.id_to_piece, range(count)))
    if sum(map(model.is_byte, range(count))) != 256:
      raise UserError(path, 'no token for some bytes', 'a model trained with byte_fallback')
    more = {i: text for i, text in sorted(published.added_tokens.items()) if i >= count}
    if list(more) != list(range(count, count + len(more))):
      raise UserError(f'{published.location}: added tokens', list(more)[0], f'consecutive ids from {count} on, after those of {MODEL}')
    control = {i: texts[i] for i in range(count) if model.is_control(i) or model.is_unknown(i)}
    ids = dict(zip([*texts, *more.values()], range(count + len(more))))
    own = {'bos_token': model.bos_id(), 'eos_token': model.eos_id(), 'pad_token': model.pad_id(), 'unk_token': model.unk_id()}
    names = {name: texts[i] for name, i in own.items() if i >= 0} | published.special_tokens
    self.prefix = b' ' if model.normalize('a').startswith('▁') else b''
    added = {i: text for i, text in published.added_tokens.items() if i >= count or texts[i] == text}
    super().__init__(published, [*map(self._bytes, range(count)), *(b'' for _ in more)], names, control | added, ids.get)
    # Special tokens that SentencePiece would recognize in any text.
    self._recognized = special_pattern(text for i, text in added.items() if i < count and i not in control)

  def _bytes(self, i: int) -> bytes:
    text = self._model.id_to_piece(i)
    return bytes.fromhex(text[3:5]) if self._model.is_byte(i) else text.replace('▁', ' ').encode()

  @property
  def start_ids(self) -> tuple[int, ...]:
    return (self.bos_id,) if self.published.config.get('add_bos_token', False) else ()

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    return np.array(self._encode_text(text, self._model), np.int32)

  def _encode_text(self, text: str, model: sentencepiece.SentencePieceProcessor) -> list[int]:
    """Encodes a text in pieces, cut inside special tokens so that SentencePiece does not recognize them."""
    cuts = [found.start() + 1 for found in re.finditer(f'(?={self._recognized.pattern})', text)] if self._recognized else []
    ids = model.encode(text[:cuts[0]] if cuts else text)
    for start, stop in zip(cuts, [*cuts[1:], len(text)]):
      ids += self._continuing.encode(text[start:stop])
    return ids

  def _encode_section(self, text: str, first: bool) -> list[int]:
    return self._encode_text(text, self._model if first or self.published.config.get('legacy', False) else self._continuing)
