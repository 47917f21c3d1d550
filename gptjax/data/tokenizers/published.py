"""The common part of published models' tokenizers: files, special tokens and chat template."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizers.tokenizer import FILE, Tokenizer, write_json

DESCRIPTION, MODEL, CONFIG, TEMPLATE = 'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'chat_template.jinja'
_SPECIAL_MAP, _ADDED = 'special_tokens_map.json', 'added_tokens.json'
_FILES = (DESCRIPTION, MODEL, CONFIG, TEMPLATE, _SPECIAL_MAP, _ADDED, 'vocab.json', 'merges.txt')

MARK = '\ufdd0'
"""A non-character that is inserted into special tokens in messages, so that they are not recognized."""


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
      value: Any = next((config[name] for config in configs if config.get(name) is not None), [])
      special_ids[name] = value if isinstance(value, list) else [value]
      if not all(type(one) is int for one in special_ids[name]):
        raise UserError(f'{directory}: {name}', value, 'an id, or a list of ids')
    return Published(str(directory), files, special_ids)

  def json(self, name: str) -> dict[str, Any]:
    """The object in a file; empty if the file does not exist."""
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
  def added_tokens(self) -> dict[int, str]:
    """Texts, by id, of special tokens that are added to those of the model file."""
    added = self.config.get('added_tokens_decoder', {})
    return {i: text for text, i in self.json(_ADDED).items()} | {
      int(i): token['content'] for i, token in added.items() if token.get('special', False)}

  @property
  def template(self) -> tuple[str, str]:
    """The chat template, empty if there is none, and its location."""
    if TEMPLATE in self.files:
      return self.files[TEMPLATE].decode(errors='replace'), f'{self.location}/{TEMPLATE}'
    template = self.config.get('chat_template') or ''
    if isinstance(template, list):  # several, for different uses
      template = next((one['template'] for one in template if one.get('name') == 'default'), '')
    return template, f'{self.location}/{CONFIG}: chat_template'


class PublishedTokenizer(Tokenizer):
  """A tokenizer of a published model.

  `decode(encode(text)) == text` up to what its files define: a normalizer such as Qwen's NFC changes text before encoding, and
  SentencePiece treats U+2581 as a space. Invalid UTF-8 may give fewer U+FFFD than in transformers.

  Raises a UserError if a special token is not in the vocabulary, or no token that ends a text is defined.

  Args:
    published, pieces: the files, and the UTF-8 bytes of each id.
    names: texts of bos_token and so on, where defined.
    special, id_of: texts of the special ids, by id; the id of a token's text, or None.
  """

  def __init__(self, published: Published, pieces: Sequence[bytes], names: Mapping[str, str], special: Mapping[int, str],
               id_of: Callable[[str], int | None]):
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
      expected = f'a token that ends a text, in {CONFIG}, or its id in generation_config.json'
      raise UserError(f'{published.location}: eos_token', None, expected)
    self._stop_ids = tuple(dict.fromkeys(ids['eos_token']))
    self.eos_id = self._stop_ids[0]
    self.bos_id, self.pad_id = ((*ids[name], self.eos_id)[0] for name in ('bos_token', 'pad_token'))
    self.unk_id = next(iter(ids.get('unk_token', [])), None)
    silent = {*special, *(values[0] for name, values in ids.items() if name in names), self.bos_id, self.pad_id, *self._stop_ids}
    super().__init__([b'' if i in silent else piece for i, piece in enumerate(pieces)])
    self._special = {text: i for i, text in special.items()}
    self._pattern = special_pattern(self._special)

  def __reduce__(self):
    return type(self), (self.published,)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    return self._stop_ids

  def _rules(self) -> list[str]:
    ids = [self.bos_id, self.eos_id, self.pad_id, self.unk_id, *self.stop_ids]
    return [str(ids), *(f'{name} {hashlib.sha256(data).hexdigest()}' for name, data in sorted(self.published.files.items()))]

  @functools.cached_property
  def _template(self) -> Any:
    from gptjax.data.tokenizers.chat import ChatTemplate  # imports Jinja
    source, location = self.published.template
    return ChatTemplate(source, location) if source else None

  def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: object) -> np.ndarray:
    if not self._template:
      return super().chat(messages, add_generation_prompt)
    variables = {'tools': None, 'documents': None, **self._names, 'add_generation_prompt': add_generation_prompt, **options}
    return np.array(self._encode_rendered(self._template.render(messages, variables, self._pattern)), np.int32)

  def _encode_rendered(self, text: str) -> list[int]:
    """Encodes a rendered template, with special tokens recognized except where they are marked."""
    ids: list[int] = []
    for index, part in enumerate(re.split(f'({self._pattern.pattern})', text) if self._pattern else [text]):
      part = part.replace(MARK, '')
      ids += [self._special[part]] if index % 2 else self._encode_section(part, first=index == 0)
    return ids

  def _encode_section(self, text: str, first: bool) -> list[int]:
    """Encodes the text between two special tokens, or before the first of them."""
    return self.encode(text).tolist()

  def save(self, directory: Path) -> None:
    # The model's config files are not part of the tokenizer, so the special ids that they define are saved in our own file.
    ids = {'bos_token_id': self.bos_id, 'eos_token_id': list(self.stop_ids), 'pad_token_id': self.pad_id}
    write_json(directory, {'kind': self.kind, **ids})
    self.save_hugging_face(directory)

  def save_hugging_face(self, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in self.published.files.items():
      (directory / name).write_bytes(data)


def special_pattern(tokens: Iterable[str]) -> re.Pattern[str] | None:
  """Matches special tokens, longest first; None if there are none."""
  longest = sorted(tokens, key=len, reverse=True)
  return re.compile('|'.join(map(re.escape, longest))) if longest else None


def json_object(location: str, data: bytes | str) -> dict[str, Any]:
  """Parses an object; a UserError names `location` if the data is something else."""
  try:
    found = json.loads(data)
  except (ValueError, RecursionError) as error:  # not JSON, numbers too long for Python, or brackets too deep
    raise UserError(location, data[:40], f'JSON ({error})') from None
  if not isinstance(found, dict):
    raise UserError(location, data[:40], 'a JSON object')
  return found
