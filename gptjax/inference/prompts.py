"""Prompts: texts and conversations."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import UserError

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation: {'role': ..., 'content': ...} each."""


def read_prompts(path: Path) -> list[tuple[str, Prompt]]:
  """Returns (FILE:LINE, for errors; prompt) for each non-empty line of a file.

  Args:
    path: a file with one text per line, or (.jsonl) one object per line with a text "prompt" or a conversation "messages".

  Raises:
    UserError: the file cannot be read or is empty, or a line is not such an object.
  """
  try:
    lines = path.read_text(encoding='utf-8').split('\n')  # not splitlines(), which also splits at other Unicode line breaks
  except (OSError, UnicodeDecodeError) as error:
    raise UserError('--prompts', str(path), f'a file of UTF-8 text ({getattr(error, "strerror", None) or error})') from None
  named = [(f'{path}:{number}', line) for number, line in enumerate(lines, 1) if line]
  if not named:
    raise UserError('--prompts', str(path), 'a file with at least one prompt')
  return [(source, _parsed(source, line) if path.suffix == '.jsonl' else line) for source, line in named]


def _parsed(source: str, line: str) -> Prompt:
  try:
    given = json.loads(line)
    prompt = given['messages'] if 'messages' in given else given['prompt']
  except (ValueError, KeyError, TypeError):
    prompt = None
  if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(isinstance(one, dict) for one in prompt)):
    raise UserError(source, line[:80], 'a JSON object with a text "prompt" or a list "messages"')
  return prompt
