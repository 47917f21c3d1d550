"""What tokenizers of published models share: their files, special tokens and chat template."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizers import chat
from gptjax.data.tokenizers.tokenizer import FILE, Tokenizer, write

DESCRIPTION, MODEL, CONFIG, TEMPLATE = 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'chat_template.jinja'
_MAP, _ADDED = 'special_tokens_map.json', 'added_tokens.json'
_KEPT = (DESCRIPTION, MODEL, CONFIG, TEMPLATE, _MAP, _ADDED, 'vocab.json', 'merges.txt')
_NUMBERS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


@dataclasses.dataclass(frozen=True)
class Published:
  """What a folder says of its tokenizer."""

  place: str
  files: Mapping[str, bytes]
  """the tokenizer's own, byte for byte"""
  numbers: Mapping[str, Sequence[int]]
  """special ids as the model's files have them: generation_config.json, or config.json for what that does not say"""

  @staticmethod
  def read(directory: Path) -> 'Published':
    """Reads a folder of Hugging Face's, or one that `PublishedTokenizer.save` wrote.

    Raises:
      UserError: a file is damaged.
    """
    files = {name: (directory / name).read_bytes() for name in _KEPT if (directory / name).exists()}
    models = [_object(directory / name, (directory / name).read_bytes())
              for name in ('generation_config.json', 'config.json') if (directory / name).exists()]
    if (directory / FILE).exists():
      models = [_object(directory / FILE, (directory / FILE).read_bytes())]
    numbers = {}
    for name in _NUMBERS:
      said: Any = next((model[name] for model in models if model.get(name) is not None), [])
      numbers[name] = said if isinstance(said, list) else [said]
      if not all(type(one) is int for one in numbers[name]):
        raise UserError(f'{directory}: {name}', said, 'an id, or a list of ids')
    return Published(str(directory), files, numbers)

  def json(self, name: str) -> dict[str, Any]:
    """The object in a file; empty where there is no such file."""
    return _object(Path(self.place, name), self.files.get(name, b'{}'))

  @functools.cached_property
  def config(self) -> dict[str, Any]:
    """What tokenizer_config.json says; an older folder's special_tokens_map.json goes before it, as in transformers."""
    config = self.json(CONFIG)
    return config if 'added_tokens_decoder' in config else config | self.json(_MAP)

  @property
  def tokens(self) -> dict[str, str]:
    """Texts of bos_token, eos_token and so on, of those that have one."""
    said = {name: self.config.get(name) for name in ('bos_token', 'eos_token', 'pad_token', 'unk_token')}
    texts = {name: token['content'] if isinstance(token, dict) else token for name, token in said.items()}
    return {name: text for name, text in texts.items() if text is not None}

  @property
  def added(self) -> dict[int, str]:
    """Texts of the special tokens that are said beside the model's own file, by id."""
    said = self.config.get('added_tokens_decoder', {})
    return {i: text for text, i in self.json(_ADDED).items()} | {
      int(i): token['content'] for i, token in said.items() if token.get('special', False)}

  @property
  def template(self) -> tuple[str, str]:
    """The chat template and its place; empty where there is none."""
    if TEMPLATE in self.files:
      return self.files[TEMPLATE].decode(errors='replace'), f'{self.place}/{TEMPLATE}'
    said = self.config.get('chat_template') or ''
    if isinstance(said, list):  # several, for several uses
      said = next((one['template'] for one in said if one.get('name') == 'default'), '')
    return said, f'{self.place}/{CONFIG}: chat_template'


class PublishedTokenizer(Tokenizer):
  """A tokenizer of files that others made.

  `decode(encode(text)) == text` as far as its files allow it: a normalizer such as Qwen's NFC changes the text before it is
  encoded, and SentencePiece takes U+2581 for a space. Bytes that are not UTF-8 may give fewer U+FFFD than in transformers.

  Args:
    published: the files.
    pieces: UTF-8 bytes of each id.
    tokens: texts of bos_token and so on, where the files have them.
    specials: texts of the special ids, by id.
    id_of: the id of a text; None: it has none.

  Raises:
    UserError: a special token that the files name is no id, or nothing says what ends a text.
  """

  def __init__(self, published: Published, pieces: Sequence[bytes], tokens: Mapping[str, str], specials: Mapping[int, str],
               id_of: Callable[[str], int | None]):
    self.published = published
    self._tokens = dict(tokens)
    named = {name: self._named(name, id_of) for name in tokens}
    said = {name: list(numbers) for name, numbers in published.numbers.items()}
    for name, numbers in said.items():
      if not all(0 <= one < len(pieces) for one in numbers):
        raise UserError(f'{published.place}: {name}', numbers, f'ids of the tokenizer, 0 to {len(pieces) - 1}')
    special = lambda name: next((one for one in [named.get(name), *said.get(f'{name}_id', [])] if one is not None), None)
    eos = special('eos_token')
    if eos is None:
      raise UserError(f'{published.place}: eos_token', None, f'what ends a text: a token in {CONFIG}, or an id in generation_config.json')
    self.eos_id = eos
    self.bos_id, self.pad_id = (eos if found is None else found for found in (special('bos_token'), special('pad_token')))
    self.unk_id = named.get('unk_token')
    self._stop_ids = tuple(dict.fromkeys([eos, *said['eos_token_id']]))
    silent = {*specials, *named.values(), self.bos_id, self.pad_id, *self._stop_ids}
    super().__init__([b'' if i in silent else piece for i, piece in enumerate(pieces)])
    self._special = {text: i for i, text in specials.items()}
    self._pattern = chat.special_pattern(self._special)

  def _named(self, name: str, id_of: Callable[[str], int | None]) -> int:
    found = id_of(self._tokens[name])
    if found is None:
      raise UserError(f'{self.published.place}: {name}', self._tokens[name], 'one of the tokens')
    return found

  def __reduce__(self):
    return type(self), (self.published,)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    return self._stop_ids

  def _rules(self) -> list[str]:
    ids = [self.bos_id, self.eos_id, self.pad_id, self.unk_id, *self.stop_ids]
    return [str(ids), *(f'{name} {hashlib.sha256(data).hexdigest()}' for name, data in sorted(self.published.files.items()))]

  @functools.cached_property
  def _template(self) -> chat.ChatTemplate | None:
    source, place = self.published.template
    return chat.ChatTemplate(source, place) if source else None

  def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: object) -> np.ndarray:
    if not self._template:
      return super().chat(messages, add_generation_prompt)
    variables = {'tools': None, 'documents': None, **self._tokens, 'add_generation_prompt': add_generation_prompt, **options}
    text = self._template.render(messages, variables, self._pattern)
    return np.array(self._parsed(text), np.int32)

  def _parsed(self, text: str) -> list[int]:
    """Ids of a rendered text, the special tokens in it found."""
    ids: list[int] = []
    for index, part in enumerate(re.split(f'({self._pattern.pattern})', text) if self._pattern else [text]):
      part = part.replace(chat.MARK, '')
      ids += [self._special[part]] if index % 2 else self._section(part, first=index == 0)
    return ids

  def _section(self, text: str, first: bool) -> list[int]:
    """Ids of a text between special tokens; `first`: none is before it."""
    return self.encode(text).tolist()

  def save(self, directory: Path) -> None:
    # The model's files are not the tokenizer's; what they say of it goes into its own.
    ids = {'bos_token_id': self.bos_id, 'eos_token_id': list(self.stop_ids), 'pad_token_id': self.pad_id}
    write(directory, {'kind': self.kind, **ids})
    self.save_hugging_face(directory)

  def save_hugging_face(self, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in self.published.files.items():
      (directory / name).write_bytes(data)


def _object(path: Path, data: bytes) -> dict[str, Any]:
  try:
    found = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise UserError(str(path), data[:40], f'JSON ({error})') from None
  if not isinstance(found, dict):
    raise UserError(str(path), data[:40], 'a JSON object')
  return found
