"""The flags that describe sources, shared by all tools."""

import json

from absl import flags

from gptjax import config as configs
from gptjax.config import SourceConfig, UserError

_FIELDS = configs.docstrings(SourceConfig)
_SOURCE = flags.DEFINE_multi_string('source', [], f'{_FIELDS["path"]}; or a JSON object with path and any other field of data.source')
_SPLIT = flags.DEFINE_string('split', SourceConfig.split, _FIELDS['split'])
_TEXT = flags.DEFINE_string('text', SourceConfig.text, _FIELDS['text'])
_SEPARATOR = flags.DEFINE_string('separator', SourceConfig.separator, _FIELDS['separator'])
_SKIP = flags.DEFINE_float('skip', SourceConfig.skip, _FIELDS['skip'])


def sources() -> list[SourceConfig]:
  """The source of each --source, in order; --split, --text, --separator and --skip are the defaults of all."""
  defaults = {'split': _SPLIT.value, 'text': _TEXT.value, 'separator': _SEPARATOR.value, 'skip': _SKIP.value}
  return [source(text, '--source', defaults) for text in _SOURCE.value or ['']]


def source(text: str, flag: str, defaults: dict[str, object]) -> SourceConfig:
  """Parses a path, or a JSON object such as '{"path": "train.jsonl", "text": "{question}"}'.

  Raises:
    UserError: the object is invalid, or has an unknown field.
  """
  fields: object = {'path': text}
  if text.startswith('{'):
    try:
      fields = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise UserError(flag, text, f'a path, or a JSON object ({error})') from None
  return configs.checked(SourceConfig, defaults | fields if isinstance(fields, dict) else fields, flag)
