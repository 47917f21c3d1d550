"""What a chapter of the guide must be, and how a test runs one."""

import ast
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from commands import ROOT
from tools.run_page import Block, blocks_of, steps_of

GUIDE = ROOT / 'docs/guide'
COUNT = 11
MOST_LINES = 60
MOST_BYTES = 80_000
COMPARISON = 'Against the package'
"""The heading below which a chapter compares what it built; all blocks before it build, but for pictures."""
ANSWER = '<details><summary>Answer</summary>'

_NUMBER = re.compile(r'[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|\d\.?)(?:e[-+]?\d+)?', re.IGNORECASE)


def chapters() -> list[str]:
  return sorted(path.name for path in GUIDE.glob('[0-9][0-9]_*.md'))


def difference(shown: str, printed: str) -> str:
  """The first difference in words; '' if all words are the same, and all numbers to 2 % or 1e-6."""
  def is_close(one, other):
    values = [float(found.replace(',', '')) for found in (one, other)]
    return math.isclose(*values, rel_tol=0.02, abs_tol=1e-6)

  for one, other in itertools.zip_longest(shown.rstrip().splitlines(), printed.rstrip().splitlines()):
    if one is None or other is None:
      return f'the page shows {one!r}, the block prints {other!r}'
    (words, numbers), (other_words, other_numbers) = ((_NUMBER.sub('#', line).split(), _NUMBER.findall(line)) for line in (one, other))
    if words != other_words or not all(map(is_close, numbers, other_numbers)):
      return f'the page shows {one!r}, the block prints {other!r}'
  return ''


def run(page: Path, folder: Path) -> tuple[list[str], str]:
  """What the blocks of a page print in a new process in a folder, up to the error of one, and that error."""
  caches = ROOT / '.jax_cache'  # compiled programs are shared with the other tests of this machine
  environment = {'PYTHONPATH': str(ROOT), 'HOME': str(caches / 'home'), 'JAX_COMPILATION_CACHE_DIR': str(caches),
                 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'MPLBACKEND': 'agg'}
  results = folder.parent / f'{folder.name}.json'
  done = subprocess.run([sys.executable, '-m', 'tools.run_page', f'--page={page}', f'--json={results}'], cwd=folder,
                        env={**os.environ, **environment}, capture_output=True, text=True)
  if not results.exists():
    return [], done.stdout + done.stderr
  found = json.loads(results.read_text())
  return found['printed'], found['failure']


def run_mistakes(page: Path, folder: Path) -> Iterator[str]:
  """What is wrong with a chapter when it runs, each with its block."""
  steps = steps_of(page.read_text())
  printed, failure = run(page, folder)
  for (block, text), output in zip(steps, printed):
    if found := difference(text.code if text else '', output):
      yield f'{page.name}, {block.place}: {found}'
  if failure:
    yield f'{page.name}, {failure}'
  elif not (folder / f'{page.stem}.png').exists():
    yield f'{page.name}: no block wrote {page.stem}.png'


def form_mistakes(page: Path) -> Iterator[str]:
  """What is wrong with a chapter as it is written."""
  text = page.read_text()
  blocks, steps = blocks_of(text), steps_of(text)
  shown = {found.line for _, found in steps if found}
  if not text.startswith('# '):
    yield f'the first line is no heading: {text.splitlines()[0]}'
  for block in blocks:
    if not block.end:
      yield f'{block.place}: the fence does not end'
    elif block.language not in ('python', 'text') or (block.language == 'text' and block.line not in shown):
      yield f'{block.place}: not a python block, nor a text block right after one'
  if mistakes := [f'{block.place}: {error}' for block, _ in steps if (error := _syntax_error(block))]:
    yield from mistakes
    return

  headings = [line[3:] for line in _prose(text).splitlines() if line.startswith('## ')]
  if headings[-2:] != ['Read next', 'Exercises'] or COMPARISON not in headings:
    yield f"headings {headings}, expected: '{COMPARISON}' and at the end 'Read next' and 'Exercises'"
  compared = ''.join(block.code for block, _ in steps if block.heading == COMPARISON)
  if not re.search(r'assert\b.*1e-5|assert_allclose\(.*1e-5|assert_array_equal\(', compared):
    yield f"'{COMPARISON}': no block asserts equality to 1e-5"
  if (lines := built_lines(text)) > MOST_LINES:
    yield f"{lines} lines of code before '{COMPARISON}', expected: at most {MOST_LINES}"

  answers = _prose(text).partition('## Exercises')[2]
  if answers.count(ANSWER) != 2 or answers.count('</details>') != 2:
    yield f'{answers.count(ANSWER)} exercises with answers, expected: 2'
  pictures = re.findall(r'!\[[^\]]{20,}\]\((\S+)\)', text)
  if pictures != [f'pictures/{page.stem}.png']:
    yield f'pictures with words that describe them {pictures}, expected: pictures/{page.stem}.png'
  yield from committed_mistakes(GUIDE / 'pictures' / f'{page.stem}.png')


def _syntax_error(block: Block) -> str:
  try:
    ast.parse(block.code)
  except SyntaxError as error:
    return str(error)
  return ''


def _prose(text: str) -> str:
  return re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)


def built_lines(text: str) -> int:
  """Lines of code before the comparison: of its statements, without imports, those that print, comments, and blocks that draw."""
  before = itertools.takewhile(lambda block: block.heading != COMPARISON, [block for block, _ in steps_of(text)])
  lines = (line.strip() for block in before if 'matplotlib' not in block.code for statement in ast.parse(block.code).body
           if not isinstance(statement, ast.Import | ast.ImportFrom) and not _prints(statement)
           for line in block.code.splitlines()[statement.lineno - 1:statement.end_lineno])
  return sum(bool(line) and not line.startswith('#') for line in lines)


def _prints(statement: ast.stmt) -> bool:
  if isinstance(statement, ast.FunctionDef | ast.ClassDef):
    return False
  return any(isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'print' for node in ast.walk(statement))


def committed_mistakes(picture: Path) -> Iterator[str]:
  if not picture.exists():
    yield f'{picture.name} is not in {picture.parent}'
    return
  if not picture.read_bytes().startswith(b'\x89PNG') or picture.stat().st_size > MOST_BYTES:
    yield f'{picture.name} has {picture.stat().st_size} bytes, expected: a PNG of at most {MOST_BYTES}'
  if (ROOT / '.git').exists():
    if subprocess.run(['git', 'ls-files', '--error-unmatch', str(picture)], cwd=ROOT, capture_output=True).returncode:
      yield f'{picture.name} is not committed'
