"""The flags that name sources, the same for every tool."""

import json

from absl import flags

from gptjax import config as configs
from gptjax.config import SourceConfig, UserError

_FIELDS = configs.docstrings(SourceConfig)
_SOURCE = flags.DEFINE_multi_string('source', [], f'{_FIELDS["path"]}; or a JSON object with path and any of the fields below')
_SPLIT = flags.DEFINE_string('split', SourceConfig.split, _FIELDS['split'])
_TEXT = flags.DEFINE_string('text', SourceConfig.text, _FIELDS['text'])
_SEPARATOR = flags.DEFINE_string('separator', SourceConfig.separator, _FIELDS['separator'])
_SKIP = flags.DEFINE_float('skip', SourceConfig.skip, _FIELDS['skip'])


def sources() -> list[SourceConfig]:
  """What every --source names, in order; --split, --text, --separator and --skip hold for all that say nothing else."""
  common = {'split': _SPLIT.value, 'text': _TEXT.value, 'separator': _SEPARATOR.value, 'skip': _SKIP.value}
  return [source(text, '--source', common) for text in _SOURCE.value or ['']]


def source(text: str, flag: str, common: dict[str, object]) -> SourceConfig:
  """The source of a path, or of a JSON object such as '{"path": "train.jsonl", "text": "{question}"}'.

  Raises:
    UserError: not such an object, or a field that it cannot have.
  """
  fields: object = {'path': text}
  if text.startswith('{'):
    try:
      fields = json.loads(text)
    except (ValueError, RecursionError) as error:
      raise UserError(flag, text, f'a path, or a JSON object ({error})') from None
  return configs.checked(SourceConfig, common | fields if isinstance(fields, dict) else fields, flag)
