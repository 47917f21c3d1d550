"""The tool writes a complete tokenizer or nothing, scores it on held-out text, and reports errors in one line."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
from memory import Memory, documents

from gptjax.config import UserError
from gptjax.data.sources import is_held_out
from gptjax.data.tokenizers import load_tokenizer
from tools.train_tokenizer import Corpus, budgets

ROOT = pathlib.Path(__file__).parents[2]

RUN = '''
import runpy, sys
sys.path[:0] = [{root!r}, {root!r} + '/tests']
from memory import Memory
import gptjax.data.sources
from gptjax.config import UserError
from gptjax.data.sources.source import Document

def open_source(config, cache_dir=None):
  if config.path == 'missing':
    raise UserError('data.source.path', config.path, 'a file')
  text = 'it was {{}} o clock in {{}} when the rain {{}} fell on the plain of {{}}\\n'
  count = 0 if config.path == 'empty' else 400
  return Memory([Document(f'{{config.path}}/{{i}}', text.format(i, config.text, i * i, i * 7) * 3) for i in range(count)])

gptjax.data.sources.open_source = open_source
sys.argv = ['train_tokenizer', *sys.argv[1:]]
runpy.run_module('tools.train_tokenizer', run_name='__main__')
'''


def tool(*arguments):
  code = RUN.format(root=str(ROOT))
  return subprocess.run([sys.executable, '-c', code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def test_a_tokenizer_is_trained_scored_and_found(tmp_path):
  out = tmp_path / 'new/tok'
  done = tool('--source=a', '--source={"path": "b", "text": "body"}', '--weights=2,1', f'--out={out}', '--vocab_size=321',
              '--multiple=8', '--digits=2', '--symbol=<|user|>', r'--symbol=.\n', '--held_out=0.1')
  assert done.returncode == 0, done.stderr
  words, head, row, last = done.stdout.splitlines()
  assert re.fullmatch(r'[\d,]+ bytes of held-out documents', words)
  assert head.split() == ['tokenizer', 'ids', 'bytes', 'per', 'token']
  assert re.fullmatch(rf'bpe \({out}\)  +328  +\d\.\d+', row)
  assert last == str(out)
  assert 'reading memory: all of it' in done.stderr
  tokenizer = load_tokenizer(out)
  assert tokenizer.vocab_size == 328
  assert tokenizer.pieces[3:5] == (b'<|user|>', b'.\n')
  assert max(len(piece) for piece in tokenizer.pieces if piece.isdigit()) == 2
  assert [path.name for path in out.parent.iterdir()] == ['tok']


def test_the_same_command_succeeds_again_and_another_is_rejected(tmp_path):
  out = tmp_path / 'tok'
  base = ['--source=a', f'--out={out}', '--vocab_size=320']
  first = tool(*base)
  assert first.returncode == 0, first.stderr
  before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
  assert tool(*base).stdout == first.stdout
  done = tool(*base, '--digits=3')
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.splitlines()[-1].startswith(f"error: --out: '{out}', expected: a new folder; this one")
  assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
  assert [path.name for path in tmp_path.iterdir()] == ['tok']


def test_what_cannot_be_written_is_not_trained(tmp_path):
  (tmp_path / 'file').write_text('')
  done = tool('--source=a', f'--out={tmp_path}/file/tok', '--vocab_size=100000')  # more than there is text for, as training would find out
  assert done.returncode == 2 and 'file' in done.stderr.splitlines()[-1] and 'vocab_size' not in done.stderr


@pytest.mark.parametrize(('arguments', 'message'), [
  (['--source=missing', '--out=DIR/x'], "error: data.source.path: 'missing', expected: a file"),
  (['--source=empty', '--out=DIR/x'], "error: --source: ['memory'], expected: sources with text to train on"),
  (['--source=a', '--out=DIR'], "error: --out: 'DIR', expected: a new folder, or one of the same tokenizer"),
  (['--source=a', '--out=DIR/x', '--weights=1,2'], "error: --weights: '1,2', expected: 1 numbers above 0, one for each --source"),
  (['--source=a', '--out=DIR/x', '--gpt2_bpe=DIR'], "error: tokenizer: 'DIR/encoder.json', expected: GPT-2's encoder.json"),
  (['--source={"pth": "a"}', '--out=DIR/x'], "error: --source.pth: 'a', expected: path, split, text, separator, "),
  (['--source=a', '--out=DIR/x', '--vocab_size=100000'], 'error: data.tokenizer.vocab_size: 100032, expected: at most '),
  (['--source=a', '--out=DIR/x', '--symbol=x'], "error: symbol: 'x', expected: distinct texts of two or more bytes"),
  (['--source=a', '--out=DIR/x', '--digits=0'], "error: --digits: '0', expected: "),
  (['--source=a'], 'error: --out: None, expected: a value')])
def test_an_error_is_one_line_and_leaves_no_files(tmp_path, arguments, message):
  done = tool(*(argument.replace('DIR', str(tmp_path)) for argument in arguments))
  assert (done.returncode, done.stdout) == (2, ''), done.stderr
  assert [line for line in done.stderr.splitlines() if line.startswith('error: ')] == done.stderr.splitlines()[-1:]
  assert done.stderr.splitlines()[-1].startswith(message.replace('DIR', str(tmp_path)))
  assert list(tmp_path.iterdir()) == []


def test_help_names_the_flags():
  done = tool('--help')
  assert done.returncode == 0
  assert all(f'--{name}' in done.stdout for name in ('source', 'weights', 'symbol', 'gpt2_bpe', 'held_out'))


def test_held_out_documents_are_never_trained_on():
  corpus = Corpus([Memory(documents(300))], [10**6], 0.1)
  trained_on = [document.name for document in corpus]
  names = [document.name for document in documents(300)]
  assert trained_on == [name for name in names if not is_held_out(name, 0.1)]
  words, texts = corpus.scored()
  assert len(texts) == 300 - len(trained_on)
  assert words == f'{100 * len(texts):,} bytes of held-out documents'


def test_without_held_out_documents_the_output_says_so():
  corpus = Corpus([Memory(documents(3))], [10**6], 0.0)
  assert len(list(corpus)) == 3
  assert corpus.scored()[0] == '300 bytes of training text, since no document is held out'


def test_the_scored_text_is_bounded():
  corpus = Corpus([Memory(documents(300, 60_000))], [10**9], 0.0)
  list(corpus)
  assert 4_900_000 < sum(map(len, corpus.scored()[1])) <= 5_000_000


def test_budgets_follow_the_weights():
  assert budgets([], 4, 1000) == [250] * 4
  assert budgets(['3', '1'], 2, 1000) == [750, 250]
  for weights in (['1'], ['1', '0'], ['1', 'x'], ['1', 'inf'], ['1', 'nan']):
    with pytest.raises(UserError, match=r'^--weights: .*2 numbers above 0'):
      budgets(weights, 2, 1000)


def test_gpt2_is_compared_on_the_same_text(tmp_path):
  alphabet = [chr(b) for b in range(33, 127)] + [chr(b) for b in range(161, 256) if b != 173] + [chr(256 + i) for i in range(68)]
  (tmp_path / 'encoder.json').write_text(json.dumps({**{c: i for i, c in enumerate(alphabet)}, '<|endoftext|>': 256}))
  (tmp_path / 'vocab.bpe').write_text('#version: 0.2\n')
  done = tool('--source=a', f'--out={tmp_path}/tok', '--vocab_size=320', f'--gpt2_bpe={tmp_path}', '--characters=20000')
  assert done.returncode == 0, done.stderr
  assert re.search(rf'^gpt2 \({tmp_path}\) +257 +1\.000$', done.stdout, re.MULTILINE)
