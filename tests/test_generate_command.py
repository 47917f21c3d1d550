"""The command gptjax.generate: files of prompts, conversations, and its errors."""

import json

import pytest
from published_tokenizers import qwen2
from test_command_line import CACHE, RECIPE, call
from tiny import files_below, write_text

SHORT = ('--max_tokens=12', f'--cache_dir={CACHE}')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The workdir of a model with Qwen's kind of tokenizer and its chat template."""
  home = tmp_path_factory.mktemp('generate')
  qwen2(home / 'qwen')
  text = write_text(home / 'text.txt')
  (home / 'recipe.py').write_text(RECIPE.format(text=str(text)))
  done = call('train', f'--config={home}/recipe.py', f'--workdir={home}/run', f'--cache_dir={CACHE}', '--config.eval.sample_tokens=0',
              f'--config.data.tokenizer.path={home}/qwen', '--config.data.context=64', '--config.model.head_size=8',
              '--config.steps=40', '--config.optimizer.peak_lr=0.03')
  assert done.returncode == 0, done.stderr
  return home / 'run'


def test_a_file_of_prompts_becomes_a_file_of_continuations(run, tmp_path):
  prompts = tmp_path / 'prompts.jsonl'
  given = [{'prompt': 'the quick'}, {'messages': [{'role': 'user', 'content': 'Hello'}]}, {'prompt': ''}]
  prompts.write_text('\n'.join(map(json.dumps, given)) + '\n\n')
  flags = (f'--workdir={run}', f'--prompts={prompts}', '--samples=2', *SHORT)
  assert call('generate', *flags, f'--out={tmp_path}/out.jsonl', '--batch_size=4').returncode == 0
  lines = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert [{**line, **dict.fromkeys(('text', 'ids', 'logprobs', 'ended'))} for line in lines] == [
    {**one, **dict.fromkeys(('text', 'ids', 'logprobs', 'ended'))} for one in given for _ in range(2)]
  assert all(len(line['ids']) == len(line['logprobs']) <= 12 for line in lines)
  assert lines[0]['text'] != lines[1]['text']  # each row has a seed of its own
  shown = call('generate', *flags)
  assert shown.stdout == ''.join(f'{line.get("prompt", "")}{line["text"]}\n---\n' for line in lines)  # whatever the batch


def test_a_conversation_is_read_from_the_keyboard_and_discarded_at_new(run):
  done = call('generate', f'--workdir={run}', '--chat', '--system=Be kind.', '--temperature=0', r'--stop=\n', *SHORT,
              given='\ufeffHello\nand\n/new\nHello\n')
  assert done.returncode == 0 and 'Traceback' not in done.stderr
  one, two, three, rest = done.stdout.split('\n')
  assert one == three != two and not rest


@pytest.mark.parametrize('flags, message', [
  (['--prompt=a', '--prompts={home}/none.txt'], "--prompt: 'a', expected: no --prompt together with --prompts"),
  (['--prompts={home}/none.txt'], "--prompts: '{home}/none.txt', expected: a file of UTF-8 text (No such file or directory)"),
  (['--prompts={home}/bad.jsonl'], "{home}/bad.jsonl:2: '{{\"prompt\": 3}}', expected: a JSON object with a text"),
  (['--prompts={home}/roles.jsonl'], 'messages: '),
  (['--stop='], "--stop: '', expected: a text of one or more characters"),
  (['--stop_ids=9999'], '--stop_ids: 9999, expected: ids of the model, 0 to '),
  (['--chat', '--prompt=a'], "--prompt: 'a', expected: none together with --chat"),
  (['--out={home}/no/out.jsonl'], "--out: '{home}/no/out.jsonl', expected: a file in an existing folder"),
  (['--min_p=2'], '--min_p: 2.0, expected: 0 to 1'),
  (['--model_axis=3', '--cpu_devices=8'], 'mesh.model: 3, expected: a divisor of the 8 devices'),
  (['--model_axis=8', '--cpu_devices=8'], 'mesh.model: 8, expected: a divisor of model.heads=2'),
])
def test_a_mistake_is_one_line(flags, message, run, tmp_path):
  (tmp_path / 'bad.jsonl').write_text('{"prompt": "a"}\n{"prompt": 3}\n')
  (tmp_path / 'roles.jsonl').write_text('{"messages": [{"content": "who?"}]}\n')
  before = files_below(tmp_path)
  done = call('generate', f'--workdir={run}', *SHORT, *(flag.format(home=tmp_path) for flag in flags))
  assert done.stderr.startswith(f'error: {message.format(home=tmp_path)}') and done.stderr.count('\n') == 1, done.stderr
  assert (done.returncode, done.stdout, files_below(tmp_path)) == (2, '', before)
