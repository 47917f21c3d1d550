"""Files of prompts, line by line."""

import json

import pytest

from gptjax.config import UserError
from gptjax.inference import read_prompts

ODD = 'page one\x0cpage two\u2028three\x85'  # these do not end a line


def test_each_non_empty_line_is_a_prompt(tmp_path):
  text, objects = tmp_path / 'prompts.txt', tmp_path / 'prompts.NDJSON'
  text.write_text(f'{ODD}\n\nnext\n', encoding='utf-8')
  assert read_prompts(text) == [(f'{text}:1', ODD), (f'{text}:3', 'next')]
  messages = [{'role': 'user', 'content': ODD}]
  given = [{'prompt': ODD}, {'messages': messages}]
  objects.write_text(''.join(json.dumps(one, ensure_ascii=False) + '\n' for one in given), encoding='utf-8')
  assert read_prompts(objects) == [(f'{objects}:1', ODD), (f'{objects}:2', messages)]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
  """Also inside a file, where two were joined."""
  text, objects = tmp_path / 'prompts.txt', tmp_path / 'prompts.jsonl'
  text.write_text('\ufeffone\n\ufefftwo\ufeff\n', encoding='utf-8')
  assert [prompt for _, prompt in read_prompts(text)] == ['one', 'two\ufeff']
  objects.write_text('\ufeff{"prompt": "one"}\n', encoding='utf-8')
  assert read_prompts(objects) == [(f'{objects}:1', 'one')]
  text.write_text('\ufeff', encoding='utf-8')
  with pytest.raises(UserError, match='expected: a file with at least one prompt'):
    read_prompts(text)


@pytest.mark.parametrize('line', ['{', '[]', '{"text": "a"}', '{"prompt": 3}', '{"messages": []}', '{"messages": ["a"]}'])
def test_the_error_for_an_invalid_line_names_it(line, tmp_path):
  (tmp_path / 'prompts.jsonl').write_text(f'{{"prompt": "a"}}\n{line}\n')
  with pytest.raises(UserError, match=r'prompts.jsonl:2: .*expected: a JSON object with a text "prompt" or a list "messages"'):
    read_prompts(tmp_path / 'prompts.jsonl')
