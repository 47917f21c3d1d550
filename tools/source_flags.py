"""The flags that describe sources, shared by all tools."""

import json

from absl import flags

from gptjax import config as configs
from gptjax.config import SourceConfig, UserError

_FIELDS = configs.docstrings(SourceConfig)
_SOURCE = flags.DEFINE_multi_string('source', [], f'{_FIELDS["path"]}; or a JSON object with path and any of the fields below')
_SPLIT = flags.DEFINE_string('split', SourceConfig.split, _FIELDS['split'])
_TEXT = flags.DEFINE_string('text', SourceConfig.text, _FIELDS['text'])
_SEPARATOR = flags.DEFINE_string('separator', SourceConfig.separator, _FIELDS['separator'])
_PROMPT = flags.DEFINE_string('prompt', SourceConfig.prompt, _FIELDS['prompt'])
_COMPLETION = flags.DEFINE_string('completion', SourceConfig.completion, _FIELDS['completion'])
_MESSAGES = flags.DEFINE_string('messages', SourceConfig.messages, _FIELDS['messages'])
_CHAT = flags.DEFINE_enum('chat', SourceConfig.chat, ['', 'template', 'plain'], _FIELDS['chat'])
_SUPERVISED = flags.DEFINE_enum('supervised', SourceConfig.supervised, ['answers', 'all'], _FIELDS['supervised'])
_SKIP = flags.DEFINE_float('skip', SourceConfig.skip, _FIELDS['skip'])


def sources() -> list[SourceConfig]:
  """The source of each --source, in order; the flags of the other fields are the defaults of all."""
  defaults = {flag.name: flag.value for flag in (_SPLIT, _TEXT, _SEPARATOR, _PROMPT, _COMPLETION, _MESSAGES, _CHAT, _SUPERVISED, _SKIP)}
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
