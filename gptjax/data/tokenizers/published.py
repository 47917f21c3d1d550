"""Tokenizers of published models: Hugging Face's tokenizer.json and SentencePiece's tokenizer.model, with their special tokens."""

import abc
import codecs
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models

from gptjax.config import UserError
from gptjax.data.folders import library_errors
from gptjax.data.sources.source import ASSISTANT
from gptjax.data.tokenizers.tokenizer import ALPHABET, FILE, Tokenizer, from_alphabet, in_parts, utf8
from gptjax.files import json_object

DESCRIPTION, MODEL, CONFIG, TEMPLATE = 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'chat_template.jinja'
_SPECIAL_MAP, _ADDED = 'special_tokens_map.json', 'added_tokens.json'
_FILES = (DESCRIPTION, MODEL, CONFIG, TEMPLATE, _SPECIAL_MAP, _ADDED, 'vocab.json', 'merges.txt')


@dataclasses.dataclass(frozen=True)
class Published:
  """The tokenizer files of a published model."""

  location: str
  files: Mapping[str, bytes]
  """contents by name"""
  special_ids: Mapping[str, Sequence[int]]
  """bos_token_id, eos_token_id and pad_token_id of the model: from generation_config.json, or else from config.json"""

  @staticmethod
  def read(directory: Path) -> 'Published':
    """Reads a folder of Hugging Face's, or one that `PublishedTokenizer.save` wrote. Raises a UserError if a file is damaged."""
    files = {name: (directory / name).read_bytes() for name in _FILES if (directory / name).exists()}
    names = [FILE] if (directory / FILE).exists() else ['generation_config.json', 'config.json']
    configs = [json_object(f'{directory}/{name}', (directory / name).read_bytes()) for name in names if (directory / name).exists()]
    special_ids = {}
    for name in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
      value: Any = next((config[name] for config in configs if config.get(name) not in (None, -1)), [])  # -1 also means none
      special_ids[name] = [one for one in (value if isinstance(value, list) else [value]) if one != -1]
      if not all(type(one) is int for one in special_ids[name]):
        raise UserError(f'{directory}: {name}', value, 'an id, or a list of ids')
    return Published(str(directory), files, special_ids)

  def json(self, name: str) -> dict[str, Any]:
    """The object in a file, {} without the file."""
    return json_object(f'{self.location}/{name}', self.files.get(name, b'{}'))

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """tokenizer_config.json; as in transformers, an older folder's special_tokens_map.json takes precedence."""
    config = self.json(CONFIG)
    return config if 'added_tokens_decoder' in config else config | self.json(_SPECIAL_MAP)

  @property
  def special_tokens(self) -> dict[str, str]:
    """Texts of bos_token, eos_token, pad_token and unk_token, where defined."""
    values = {name: self.config.get(name) for name in ('bos_token', 'eos_token', 'pad_token', 'unk_token')}
    texts = {name: token['content'] if isinstance(token, dict) else token for name, token in values.items()}
    return {name: text for name, text in texts.items() if text is not None}

  @property
  def added_tokens(self) -> dict[int, tuple[str, bool]]:
    """Tokens beside those of the model file, by id: their texts and whether they are special."""
    added = self.config.get('added_tokens_decoder', {})
    return {i: (text, True) for text, i in self.json(_ADDED).items()} | {
      int(i): (token['content'], token.get('special', False)) for i, token in added.items()}

  @property
  def template(self) -> tuple[str, str]:
    """The chat template, empty if there is none, and its location."""
    if TEMPLATE in self.files:
      return self.files[TEMPLATE].decode('utf-8-sig', errors='replace'), f'{self.location}/{TEMPLATE}'
    template = self.config.get('chat_template') or ''
    if isinstance(template, list):  # several, for different uses
      template = next((one['template'] for one in template if one.get('name') == 'default'), '')
    return template, f'{self.location}/{CONFIG}: chat_template'


class PublishedTokenizer(Tokenizer):
  """A tokenizer of a published model.

  `decode(encode(text)) == text` up to what its files define: a normalizer such as Qwen's NFC changes text before encoding, and
  SentencePiece treats U+2581 as a space. Invalid UTF-8 may give fewer U+FFFD than in transformers.

  In a conversation, a control token is a special token or any other added token that the chat template writes. The template writes it
  under a random name, so that the same text in a message or a tool is text.

  `names` are the texts of bos_token and so on, `special` those of the special ids, and `added` all that a chat template may write;
  `id_of` returns the id of a text, or None. Raises a UserError if a special token is not in the vocabulary, or no token that ends a
  text is defined.
  """

  def __init__(self, published: Published, pieces: Sequence[bytes], names: Mapping[str, str], special: Mapping[int, str],
               added: Mapping[int, str], id_of: Callable[[str], int | None]):
    self.published = published
    self._names = dict(names)
    ids: dict[str, list[int]] = {}
    for name, text in names.items():
      if (found := id_of(text)) is None:
        raise UserError(f'{published.location}: {name}', text, 'a token of the vocabulary')
      ids[name] = [found]
    for name, values in published.special_ids.items():
      if not all(0 <= one < len(pieces) for one in values):
        raise UserError(f'{published.location}: {name}', list(values), f'ids of the tokenizer, 0 to {len(pieces) - 1}')
      ids[name.removesuffix('_id')] = [*ids.get(name.removesuffix('_id'), []), *values]
    if not ids['eos_token']:
      raise UserError(f'{published.location}: eos_token', None, f'a token that ends a text, in {CONFIG}, or its id in '
                      'generation_config.json')
    self.stop_ids = tuple(dict.fromkeys(ids['eos_token']))
    self.eos_id = self.stop_ids[0]
    self.bos_id, self.pad_id = ((*ids[name], self.eos_id)[0] for name in ('bos_token', 'pad_token'))
    self.unk_id = next(iter(ids.get('unk_token', [])), None)
    # The model's config files, which may define special ids, are not part of the tokenizer.
    self.saved = {'bos_token_id': self.bos_id, 'eos_token_id': list(self.stop_ids), 'pad_token_id': self.pad_id}
    silent = {*special, *(values[0] for name, values in ids.items() if name in names), self.bos_id, self.pad_id, *self.stop_ids}
    super().__init__([b'' if i in silent else piece for i, piece in enumerate(pieces)])
    self._special = {text: i for i, text in special.items()}
    # A run of spaces or line ends is layout, whoever writes it.
    self._added = self._special | {text: i for i, text in added.items() if not text.isspace()}

  def __reduce__(self):
    return type(self), (self.published,), {'plain_chat': self.plain_chat}

  def _rules(self) -> list[str]:
    ids = [self.bos_id, self.eos_id, self.pad_id, self.unk_id, *self.stop_ids]
    return [str(ids), *(f'{name} {hashlib.sha256(data).hexdigest()}' for name, data in sorted(self.published.files.items()))]

  @functools.cached_property
  def _aliases(self) -> dict[str, str]:
    """Names under which the chat template writes tokens. They are random, so that no message can contain one."""
    secret = secrets.token_hex(8)
    return {text: f'<{secret}-{i}>' for text, i in self._added.items()}

  @functools.cached_property
  def _template(self) -> Any:
    from gptjax.data.tokenizers.chat import ChatTemplate  # imports Jinja
    source, location = self.published.template
    return ChatTemplate(source, location, self._aliases) if source else None

  @functools.cached_property
  def _control(self) -> dict[str, int]:
    """Ids of control tokens by their texts."""
    written = {*self._special, *self._names.values(), *self._template.written}
    return {text: i for text, i in self._added.items() if text in written}

  @property
  def template_ids(self) -> Iterable[int]:
    return [self._special[text] for text in self._special if self._template and text in self._template.written]

  def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: object) -> np.ndarray:
    if self.plain_chat or not self._template:
      return super().chat(messages, add_generation_prompt)
    return np.array(self._encode_rendered(self._rendered(messages, add_generation_prompt, options)), np.int32)

  def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[np.ndarray, int | None]]:
    if self.plain_chat or not self._template:
      return super().conversation(messages)
    from gptjax.data.tokenizers.chat import answers
    ends = {text: self._aliases[text] for text, i in self._control.items() if i in self.stop_ids}
    text, spans = answers(self._rendered, messages, self._aliases.values(), ends, self.published.template[1])
    edges = [0, *(edge for _, *span in spans for edge in span), len(text)]
    numbers = [number for answer, *_ in spans for number in (None, answer)]
    encode = lambda text: np.array(self._encode_rendered(text), np.int32)
    parts = in_parts([text[begin:end] for begin, end in itertools.pairwise(edges)], encode, bool(self.prefix))
    return list(zip(parts, [*numbers, None], strict=True))

  def _rendered(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, options: Mapping[str, object] = {}) -> str:
    names = {name: self._aliases.get(text, text) for name, text in self._names.items()}
    variables = {'tools': None, 'documents': None, **names, 'add_generation_prompt': add_generation_prompt, **options}
    text = self._template.render(messages, variables)
    utf8(text, 'messages')
    return text

  @abc.abstractmethod
  def _encode_rendered(self, text: str) -> list[int]:
    """Encodes a rendered template, which has control tokens under their aliases."""

  def save(self, directory: Path) -> None:
    super().save(directory)
    self.save_hugging_face(directory)

  def save_hugging_face(self, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in self.published.files.items():
      (directory / name).write_bytes(data)


class HuggingFaceTokenizer(PublishedTokenizer):
  """A tokenizer.json, encoded by the `tokenizers` package: byte-level BPE or unigram (GPT-2, Qwen, Llama 3, OLMo 2), or with ▁ for a space.

  As in transformers, a space at the start of a text is lost where Metaspace prepends one. Raises a UserError if the file is damaged
  or describes something else.
  """

  kind = 'hugging_face'

  def __init__(self, published: Published):
    description = published.json(DESCRIPTION)
    self._backend = _backend(published)
    self._backend.encode_special_tokens = True  # text that looks like a special token is text
    vocab = self._backend.get_vocab(with_added_tokens=True)
    if missing := {*range(len(vocab))} - {*vocab.values()}:
      raise UserError(f'{published.location}/{DESCRIPTION}, id {min(missing)}', None, f'{len(vocab)} consecutive ids, each of one token')
    tokens = sorted(vocab, key=vocab.__getitem__)
    bytes_of, self.prefix = _byte_decoder(description.get('decoder'), published)
    added = self._backend.get_added_tokens_decoder()
    special = {i: token.content for i, token in added.items() if token.special}
    model = description['model']
    unk = model['vocab'][model['unk_id']][0] if isinstance(model.get('unk_id'), int) else model.get('unk_token')
    names = ({'unk_token': unk} if unk else {}) | published.special_tokens
    super().__init__(published, list(map(bytes_of, tokens)), names, special, {i: token.content for i, token in added.items()}, vocab.get)
    if isinstance(self._backend.model, models.Unigram):  # its special tokens have scores, like other tokens
      self._backend = _renamed(self._backend, {text: self._aliases[text] for text in self._special})
      self._backend.encode_special_tokens = True
    if self.unk_id is None and not {bytes([byte]) for byte in range(256)} <= set(self.pieces):
      raise UserError(f'{published.location}/{DESCRIPTION}', 'no token for some bytes', 'all 256 bytes, or an unk_token')

  @functools.cached_property
  def _chat_backend(self) -> tokenizers.Tokenizer:
    """The tokenizer with its control tokens renamed to their aliases."""
    return _renamed(self._backend, {text: self._aliases[text] for text in self._control})

  @functools.cached_property
  def start_ids(self) -> tuple[int, ...]:
    with_special, without = (self._backend.encode('a', add_special_tokens=add).ids for add in (True, False))
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
    return self._chat_backend.encode(text, add_special_tokens=False).ids


def _backend(published: Published) -> tokenizers.Tokenizer:
  path, data = f'{published.location}/{DESCRIPTION}', published.files[DESCRIPTION]
  with library_errors(path, f'{len(data)} bytes', 'a file that the tokenizers package can read'):
    backend = tokenizers.Tokenizer.from_buffer(data.removeprefix(codecs.BOM_UTF8))
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


def _renamed(backend: tokenizers.Tokenizer, names: Mapping[str, str]) -> tokenizers.Tokenizer:
  """A tokenizer with the same ids, some of them under other names, which their former names in a text do not give."""
  described = json.loads(backend.to_str())
  model, renamed = described['model'], lambda text: names.get(text, text)
  for token in described['added_tokens']:
    token['content'] = renamed(token['content'])
  if isinstance(backend.model, models.Unigram):
    model['vocab'] = [(renamed(text), score) for text, score in model['vocab']]
  else:
    model['vocab'] = {renamed(text): i for text, i in model['vocab'].items()}
    model['merges'] = [pair for pair in model['merges'] if names.keys().isdisjoint([*pair, ''.join(pair)])]
    model['unk_token'] = renamed(model['unk_token'])
  return tokenizers.Tokenizer.from_str(json.dumps(described))


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


class SentencePieceModel(PublishedTokenizer):
  """A tokenizer.model (Llama 2, Mistral, Gemma), encoded by the sentencepiece package, and the tokens that its folder adds, which
  only a chat template writes.

  In a conversation, SentencePiece's space is prepended to the text after a special token only if tokenizer_config.json has
  `"legacy": true`. Raises a UserError if the file is damaged, or the model has no byte fallback.
  """

  kind = 'sentencepiece'

  def __init__(self, published: Published):
    path, data = f'{published.location}/{MODEL}', published.files[MODEL]
    with library_errors(path, f'{len(data)} bytes', 'a model that SentencePiece can read'):
      self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]  # defined at import
    proto.normalizer_spec.add_dummy_prefix = False
    self._continuing = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())  # for text that follows other text
    model, count = self._model, self._model.vocab_size()
    texts = list(map(model.id_to_piece, range(count)))
    if sum(map(model.is_byte, range(count))) != 256:
      raise UserError(path, 'no token for some bytes', 'a model trained with byte_fallback')
    more = {i: text for i, (text, _) in sorted(published.added_tokens.items()) if i >= count}
    if list(more) != list(range(count, count + len(more))):
      raise UserError(f'{published.location}: added tokens', list(more)[0], f'consecutive ids from {count} on, after those of {MODEL}')
    control = {i: texts[i] for i in range(count) if model.is_control(i) or model.is_unknown(i)}
    ids = dict(zip([*texts, *more.values()], range(count + len(more))))
    own = {'bos_token': model.bos_id(), 'eos_token': model.eos_id(), 'pad_token': model.pad_id(), 'unk_token': model.unk_id()}
    names = {name: texts[i] for name, i in own.items() if i >= 0} | published.special_tokens
    self.prefix = b' ' if model.normalize('a').startswith('▁') else b''
    added = {i: text for i, (text, special) in published.added_tokens.items() if special and (i >= count or texts[i] == text)}
    pieces = [bytes.fromhex(text[3:5]) if model.is_byte(i) else text.replace('▁', ' ').encode() for i, text in enumerate(texts)]
    defined = {i: piece.piece for i, piece in enumerate(proto.pieces) if piece.type == piece.USER_DEFINED}
    pieces += [text.encode() for text in more.values()]
    super().__init__(published, pieces, names, control | added, defined | more, ids.get)
    self._defined = {*defined.values()}  # SentencePiece recognizes them in any text
    self._special_starts = self._starts(self._special)

  @property
  def start_ids(self) -> tuple[int, ...]:
    return (self.bos_id,) if self.published.config.get('add_bos_token', False) else ()

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    return np.array(self._encode_text(text, self._model, self._special_starts), np.int32)

  def _starts(self, tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern of the places where SentencePiece would recognize one of some tokens."""
    return re.compile(f'(?={any_of(self._defined.intersection(tokens))})')

  def _encode_text(self, text: str, model: sentencepiece.SentencePieceProcessor, starts: re.Pattern[str]) -> list[int]:
    """Encodes a text in pieces, cut one character after each start of a token so that SentencePiece does not recognize it."""
    cuts = [found.start() + 1 for found in starts.finditer(text)]
    ids = model.encode(text[:cuts[0]] if cuts else text)
    for start, stop in zip(cuts, [*cuts[1:], len(text)]):
      ids += self._continuing.encode(text[start:stop])
    return ids

  @functools.cached_property
  def _aliased(self) -> tuple[re.Pattern[str], dict[str, int], re.Pattern[str]]:
    """A pattern of the aliases of control tokens, with the white space that a token strips; their ids; a pattern of control tokens."""
    strips = {token['content']: token for token in self.published.config.get('added_tokens_decoder', {}).values()}
    spaces = {text: [r'\s*' if strips.get(text, {}).get(side) else '' for side in ('lstrip', 'rstrip')] for text in self._control}
    patterns = (f'{left}{self._aliases[text]}{right}' for text, (left, right) in spaces.items())
    ids = {self._aliases[text]: i for text, i in self._control.items()}
    return re.compile('|'.join(patterns) or '(?!)'), ids, self._starts(self._control)

  def _encode_rendered(self, text: str) -> list[int]:
    pattern, ids_of, starts = self._aliased
    continuing = self._model if self.published.config.get('legacy', False) else self._continuing
    ids, start, model = [], 0, self._model
    for found in pattern.finditer(text):
      ids += [*self._encode_text(text[start:found.start()], model, starts), ids_of[found[0].strip()]]
      start, model = found.end(), continuing
    return ids + self._encode_text(text[start:], model, starts)


def any_of(tokens: Iterable[str]) -> str:
  """A regular expression of any of some tokens, the longest first; without tokens it matches nothing."""
  return '|'.join(map(re.escape, sorted(tokens, key=len, reverse=True))) or '(?!)'
