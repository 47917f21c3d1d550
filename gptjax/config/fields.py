"""The fields of a config by dotted name ('model.layers'); `override` checks values from flags, recipes, JSON files and sweeps alike."""

import dataclasses
import difflib
import json
import pathlib
import re
import sys
import typing
from collections.abc import Mapping
from typing import Any, Literal

from gptjax.config.checks import UserError
from gptjax.config.durations import DURATIONS, Duration
from gptjax.config.schema import Config

Value = int | float | str | tuple
"""Type of a field's value; bool is an int, and a tuple holds dataclasses or values."""

BOOLEANS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


def flatten(config: Any, prefix: str = '') -> dict[str, Any]:
  """Returns {dotted name: value} of a config, or of its JSON, in the order of the schema."""
  flat: dict[str, Any] = {}
  for name, value in (config if isinstance(config, dict) else vars(config)).items():
    nested = isinstance(value, dict) or dataclasses.is_dataclass(value)
    flat |= flatten(value, f'{prefix}{name}.') if nested else {prefix + name: value}
  return flat


def _hints(group: Any) -> dict[str, Any]:
  return {name: _hints(hint) if dataclasses.is_dataclass(hint) else hint for name, hint in typing.get_type_hints(group).items()}


FIELDS = flatten(_hints(Config))
"""Dotted name -> type, in the order of the schema."""


def unescaped(text: str) -> str:
  """A text of a command line, in which `\\n`, `\\t` and `\\\\` stand for a line end, a tab and a backslash."""
  return re.sub(r'\\([nt\\])', lambda found: {'n': '\n', 't': '\t', '\\': '\\'}[found[1]], text)


def differences(a: Config, b: Config) -> dict[str, tuple[Value, Value]]:
  """Returns {dotted name: (value in a, value in b)} of the fields that differ."""
  ours, theirs = flatten(a), flatten(b)
  return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def override(config: Config, values: Mapping[str, object], where: str = '') -> Config:
  """A config with some values replaced, such as {'model.width': 96, 'model.heads': 3}; it is validated after all of them are in place.

  Raises a UserError for an unknown name, a value of a wrong type, or an invalid value; `where` is put before names in errors: '--config.',
  or a file and a colon.
  """
  for name, value in values.items():
    if name not in FIELDS:
      raise _unknown(name, value, where)
  return _rebuild(config, {name: checked(FIELDS[name], value, where + name) for name, value in values.items()})


def checked(hint: Any, value: Any, name: str) -> Any:
  """Converts a value to the type of its hint (JSON's lists and objects become tuples and dataclasses), or raises a UserError."""
  if item := item_type(hint):
    if not isinstance(value, (list, tuple)):
      raise UserError(name, value, expected(hint))
    return tuple(checked(item, one, f'{name}[{index}]') for index, one in enumerate(value))
  if dataclasses.is_dataclass(hint):
    return _checked_object(hint, value, name)
  if not _accepts(hint, value):
    raise UserError(name, value, expected(hint), map(str, choices(hint)))
  return float(value) if hint is float else value


def _checked_object(hint: Any, value: Any, name: str) -> Any:
  hints = typing.get_type_hints(hint)
  if isinstance(value, hint):
    value = vars(value)
  if not isinstance(value, dict):
    raise UserError(name, value, f'an object with {", ".join(hints)}')
  for field in value:
    if field not in hints:
      raise UserError(f'{name}.{field}', value[field], ', '.join(hints), list(hints), field)
  for field in dataclasses.fields(hint):
    if field.default is dataclasses.MISSING and field.name not in value:
      raise UserError(f'{name}.{field.name}', None, f'{expected(hints[field.name])}; the field is missing')
  return hint(**{field: checked(hints[field], one, f'{name}.{field}') for field, one in value.items()})


def _rebuild(group: Any, values: Mapping[str, object], prefix: str = '') -> Any:
  if prefix and not any(name.startswith(prefix) for name in values):  # it has been validated
    return group
  new = {name: _rebuild(old, values, f'{prefix}{name}.') if dataclasses.is_dataclass(old) else values.get(prefix + name, old)
         for name, old in vars(group).items()}
  return dataclasses.replace(group, **new)


def _unknown(name: str, value: object, where: str) -> UserError:
  parts = name.split('.')
  levels = ('.'.join([*parts[:n], '']) for n in range(len(parts), -1, -1))
  level = next(level for level in levels if any(known.startswith(level) for known in FIELDS))
  here = dict.fromkeys(known[len(level):].partition('.')[0] for known in FIELDS if known.startswith(level))
  if level == f'{name}.':
    return UserError(where + name, value, f'one of its fields, since it is a group: {", ".join(here)}')
  return UserError(where + name, value, ', '.join(here), nearest(name, where if where.startswith('--') else ''), name)


_SYNONYMS = {
  'learning_rate': 'lr', 'key_value': 'kv', 'n_embd': 'width', 'd_model': 'width', 'hidden_size': 'width', 'intermediate_size': 'mlp_width',
  'head_dim': 'head_size', 'block_size': 'context', 'seq_len': 'context', 'ctx': 'context', 'accumulation_steps': 'microbatches',
  'iters': 'steps', 'epochs': 'steps', 'grad_norm': 'clip', 'clip_norm': 'clip', 'beta': 'b', 'precision': 'dtype', 'save': 'checkpoint'}
"""Other projects' words for ours."""


def nearest(name: str, prefix: str = '') -> dict[str, str]:
  """{name: the field, after a prefix, that an unknown name may mean}; empty if no field is like it.

  Its last part may be misspelled, abbreviated (bs), or in the wrong group; or all of its words are in a field's name, or the reverse.
  """
  if (above := name.rpartition('.')[0]) in FIELDS:  # a part of a value
    return {name: prefix + above}
  text = name.lower()[-100:]  # comparing longer ones would take long
  for theirs, ours in _SYNONYMS.items():
    text = text.replace(theirs, ours)
  likeness = {field: _likeness(text, field) for field in FIELDS}
  best = max(likeness, key=lambda field: likeness[field])  # of equal ones the first
  return {name: prefix + best} if likeness[best] else {}


def _likeness(given: str, field: str) -> float:
  (groups, _, last), (own_groups, _, own) = given.rpartition('.'), field.rpartition('.')
  words, own_words = _words(last), _words(own)
  found = {one for one in own_words for word in words if one == word or (len(word) > 3 and one.startswith(word))}
  alike = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
  typo = alike(last, own) if not groups or alike(given, field) >= 0.8 else 0.0
  short = len(last) > 1 and last == ''.join(word[0] for word in own_words)
  score = max(len(found) / len(words) / 2 + len(found) / len(own_words) / 2 if words else 0.0, typo if typo >= 0.8 else 0.0,
              short * (0.6 - field.count('.') / 100))
  return score + len({*_words(groups), *words} & {*_words(own_groups)}) / 10 if score > 0.5 else 0.0


def _words(text: str) -> list[str]:
  """The words of a name, without plurals and words for numbers."""
  return [word.removesuffix('s') for word in re.split(r'[\W_]+', text) if word and word not in ('n', 'num', 'number', 'max')]


def choices(hint: Any) -> tuple[Any, ...]:
  """Returns the values of a Literal, else (); that of an open one, `Literal[...] | str`, also has MODULE:NAME."""
  hint = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Union else hint
  return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def item_type(hint: Any) -> Any:
  """Returns the type of the items of a tuple[type, ...], else None."""
  return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _accepts(hint: Any, value: object) -> bool:
  if choices(hint):
    return value in choices(hint) or (typing.get_origin(hint) is typing.Union and isinstance(value, str) and ':' in value)
  if isinstance(value, bool) or hint is bool:
    return isinstance(value, bool) and hint is bool
  if hint is float:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # an int may be larger than any
  return isinstance(value, hint)


def expected(hint: Any) -> str:
  """Describes the valid values of a hint, for an error."""
  if choices(hint):
    return ', '.join(map(str, choices(hint))) + (', or MODULE:NAME of your own' if typing.get_origin(hint) is typing.Union else '')
  if item := item_type(hint):
    if not dataclasses.is_dataclass(item):
      return 'a JSON list'
    first, *more = typing.get_type_hints(item)
    return f"a JSON list of objects with {', '.join([first, *more])}, as '[{{\"{first}\": ...}}]'"
  return {int: 'an integer', float: 'a number', bool: 'true or false', str: 'text'}.get(hint, DURATIONS)


def parse(hint: Any, text: str | None) -> object:
  """Parses a flag's text; returns invalid text unchanged, which `override` then rejects."""
  if text is None or hint is None or choices(hint):
    return text
  if hint is bool:
    return BOOLEANS.get(text.lower(), text)
  try:
    return json.loads(text) if item_type(hint) else int(text) if hint == Duration else hint(text)
  except (ValueError, RecursionError):  # RecursionError: JSON that is nested too deeply
    return text


def to_json(config: Config) -> str:
  """Returns a config as JSON text, nested as in the schema; `from_json` is the inverse."""
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text: str, file: str = 'config.json') -> Config:
  """Returns the config that `to_json` wrote; a UserError names the file, and the line or field that is wrong or missing."""
  try:
    tree = json.loads(text)
  except json.JSONDecodeError as error:
    line = text.split('\n')[error.lineno - 1]
    raise UserError(f'{file}:{error.lineno}', line[:80], f'JSON ({error.msg})') from error
  except (ValueError, RecursionError) as error:  # a number that is too long for Python, nesting that is too deep
    raise UserError(file, text[:80], f'JSON of a config ({error})') from error
  if not isinstance(tree, dict):
    raise UserError(file, tree, 'an object of config fields')
  if 'model_type' in tree:
    raise UserError(f'{file}: model_type', tree['model_type'], 'the config of a run, which tools.import_hf makes of a Hugging Face folder')
  values = flatten(tree)
  config = override(Config(), values, where=f'{file}: ')
  for name, hint in FIELDS.items():
    if name not in values:
      raise UserError(f'{file}: {name}', None, f'{expected(hint)}; the field is missing')
  return config


def read_config(folder: pathlib.Path) -> Config:
  """Returns the config of a run or checkpoint from its folder; raises a UserError if there is no config.json, or it is damaged."""
  try:
    return read_json(folder / 'config.json')
  except FileNotFoundError:
    raise UserError('--workdir', str(folder), 'a folder that gptjax.train made, with its config.json') from None


def read_json(file: pathlib.Path) -> Config:
  """Returns the config in a file that `to_json` wrote; raises a UserError if it is damaged."""
  try:
    return from_json(file.read_text(encoding='utf-8-sig'), str(file))
  except UnicodeDecodeError as error:
    raise UserError(str(file), str(error), 'JSON of a config, in UTF-8') from None
