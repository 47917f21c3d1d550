"""The commands that make and show stores: their output, and their errors."""

import json
import pathlib
import subprocess
import sys

import pytest
from small_stores import texts
from tiny import files_below

from gptjax.data import TokenStore

ROOT = pathlib.Path(__file__).parents[2]


def tool(name, *flags):
  return subprocess.run([sys.executable, '-m', f'tools.{name}', *map(str, flags)], capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A folder with questions, a store of them, and files that are wrong."""
  folder = tmp_path_factory.mktemp('home')
  lines = [json.dumps({'question': f'what is {i} and {i}', 'answer': f'it is {2 * i}'}) + '\n' for i in range(100)]
  (folder / 'qa.jsonl').write_text(''.join(lines))
  (folder / 'broken.jsonl').write_bytes(''.join(lines[:7]).encode() + b'{"question": "\xff"}\n')
  (folder / 'binary.txt').write_bytes(bytes(range(256)))
  (folder / 'empty.txt').touch()
  done = tool('prepare_data', f'--source={folder}/qa.jsonl', r'--text={question}?\n{answer}', '--tokenizer=bytes', f'--out={folder}/store')
  assert done.returncode == 0, done.stderr
  assert done.stdout.startswith(f'{folder}/store: 100 documents, ')
  return folder


def test_a_store_contains_the_templates_text_and_is_displayed(home):
  assert texts(TokenStore.open(home / 'store'))[3] == 'what is 3 and 3?\nit is 6'
  done = tool('inspect_data', f'--store={home}/store', '--documents=2', '--characters=10')
  assert done.returncode == 0 and 'what is 0 …' in done.stdout and 'document 99' in done.stdout and '16 to 31' in done.stdout


def test_the_same_command_leaves_the_store_unchanged(home):
  before = files_below(home)
  flags = (f'--source={home}/qa.jsonl', r'--text={question}?\n{answer}', '--tokenizer=bytes', f'--out={home}/store')
  done = tool('prepare_data', *flags)
  assert done.returncode == 0 and 'exists already' in done.stderr and files_below(home) == before


def test_the_sides_of_ten_records_are_told(home, tmp_path):
  (tmp_path / 'ten.jsonl').write_text(''.join((home / 'qa.jsonl').read_text().splitlines(keepends=True)[:10]))
  for side, counted in (('train', '9 documents'), ('valid', '1 document')):
    done = tool('prepare_data', f'--source={tmp_path}/ten.jsonl', '--text=question', '--tokenizer=bytes', f'--side={side}',
                '--valid_fraction=0.1', f'--out={tmp_path}/{side}')
    assert done.stdout.startswith(f'{tmp_path}/{side}: {counted}, ')
    assert done.stdout.splitlines()[1:] == ['held out for validation: 10% of the text: 1 of 10 documents']


def test_evaluation_sets_are_sources_or_stores(home, tmp_path):
  text = tmp_path / 'text.txt'
  text.write_text('A quiet evening.\n\nwhat is 41 and 41? It is 82, they say.\n\nAnother one.')
  (tmp_path / 'long.jsonl').write_text(json.dumps({'text': 'what is 41 and 41 it is 82'}) + '\n')
  for evaluation in (f'{home}/store', f'{tmp_path}/long.jsonl'):
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    done = tool('prepare_data', f'--source={text}', r'--separator=\n\n', '--tokenizer=bytes', f'--decontaminate=exam={evaluation}',
                f'--out={out}')
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == ['dropped by decontamination, exam: 1 document']


@pytest.mark.parametrize('flags, message', [
  (['--source={home}/qa.jsonl'], "{home}/qa.jsonl:1: 'text', expected: a field that the record has: question, answer"),
  (['--source={home}/broken.jsonl', '--text=question'], '{home}/broken.jsonl:8: '),
  (['--source={home}/binary.txt'], r"{home}/binary.txt: b'\x00\x01\x02\x03\x04\x05\x06\x07', expected: UTF-8 text; this is a binary file"),
  (['--source={home}/empty.txt'], "data.source.path: '{home}/empty.txt', expected: files that are not empty"),
  (['--source={home}/qa.jsonl', '--text=question', '--decontaminate=a={home}/qa.jsonl'], "{home}/qa.jsonl:1: 'text', expected: a field"),
  (['--source={home}/qa.jsonl', '--text=question', '--decontaminate=a'], "--decontaminate: 'a', expected: NAME=SOURCE"),
  (['--source={"path": "x", "txt": 1}'], '--source.txt: 1, expected: path, split, text, separator, prompt, completion, messages, chosen, '
   'rejected, mismatched, chat, supervised, label, labels, skip; did you mean text?'),
  (['--source={home}/qa.jsonl', '--min_chars=-1'], '--min_chars: -1, expected: 0 or more characters'),
  (['--source={home}/qa.jsonl', '--source={home}/binary.txt'], "--source: '{home}/binary.txt', expected: one source"),
  (['--source={home}/qa.jsonl', '--out={home}/store'], "--out: '{home}/store', expected: another folder"),
  (['--source={home}/store'], "data.source.path: '{home}/store', expected: documents; this folder is a token store"),
  (['--source={home}/qa.jsonl', '--out={home}'], "--out: '{home}', expected: a new folder"),
  (['--source={home}/qa.jsonl', '--valid_fraction=0.1'], "--side: 'all', expected: train or valid"),
  (['--source={home}/qa.jsonl', '--out=s3://bucket/x'], "--out: 's3://bucket/x', expected: a folder on this machine"),
])
def test_an_error_is_one_line_and_leaves_no_files(home, tmp_path, flags, message):
  before = files_below(home)
  out = [f'--out={tmp_path}/out'] * (not any(flag.startswith('--out=') for flag in flags))
  done = tool('prepare_data', '--tokenizer=bytes', *out, *(flag.replace('{home}', str(home)) for flag in flags))
  errors = [line for line in done.stderr.splitlines() if not line.startswith(('reading ', 'tokenizing: ', f'{home}/store exists'))]
  assert len(errors) == 1 and errors[0].startswith('error: ' + message.replace('{home}', str(home))), done.stderr
  assert (done.returncode, done.stdout) == (2, '') and files_below(home) == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize('flags, message', [
  ([], '--store: None, expected: a token store; or --config'),
  (['--store={home}'], "token store: '{home}', expected: "),
  (['--store={home}/store', '--plot=x.jpg'], "--plot: 'x.jpg', expected: a file that ends in .png"),
  (['--workdir={home}'], "--workdir: '{home}', expected: a folder that gptjax.train made"),
  (['--store={home}/store', '--workdir={home}'], "--store: '{home}/store', expected: one of"),
  (['--config.seed=1'], "--config: '', expected: configs/"),
])
def test_an_error_of_inspect_data_is_one_line(home, flags, message):
  done = tool('inspect_data', *(flag.format(home=home) for flag in flags))
  assert done.stderr.startswith('error: ' + message.format(home=home)) and done.stderr.count('\n') == 1
  assert (done.returncode, done.stdout) == (2, '')


def test_the_first_step_is_1(home):
  done = tool('inspect_data', f'--store={home}/store', '--step=0')
  assert (done.returncode, done.stderr.count('\n')) == (2, 1) and done.stderr.startswith("error: --step: '0', expected: ")
