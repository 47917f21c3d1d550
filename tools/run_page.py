"""Runs the Python blocks of a page, such as a chapter of the guide: python -m tools.run_page --page=docs/guide/02_attention.md [--write]

All blocks run in order in one process and share their names. What a block prints is shown below its place. With --write the page's text
blocks become what the blocks before them print, and pictures that they save go to the folder pictures/ beside the page.
"""

import contextlib
import dataclasses
import io
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from gptjax import config as configs
from gptjax.config import UserError
from gptjax.files import expanded, writable, write_atomic, write_json

_PAGE = flags.DEFINE_string('page', None, 'Markdown file', required=True)
_WRITE = flags.DEFINE_bool('write', False, 'update the text blocks and pictures of the page')
_JSON = flags.DEFINE_string('json', None, 'file for what each block printed')


@dataclasses.dataclass
class Block:
  """A block between fences."""

  language: str
  heading: str
  """the last one before it"""
  line: int
  """number of its first line in the page, from 1"""
  code: str = ''
  end: int = 0
  """number of the line of its closing fence; 0: there is none"""

  @property
  def place(self) -> str:
    """Its place in words."""
    return f"line {self.line}, '{self.heading}'"


def blocks_of(text: str) -> list[Block]:
  """The blocks of a page in order."""
  blocks: list[Block] = []
  heading, inside = '', False
  for number, line in enumerate(text.splitlines(), 1):
    if inside and line == '```':
      blocks[-1].end, inside = number, False
    elif inside:
      blocks[-1].code += f'{line}\n'
    elif line.startswith('```'):
      blocks.append(Block(line[3:], heading, number + 1))
      inside = True
    elif match := re.match(r'#+ (.*)', line):
      heading = match[1]
  return blocks


def steps_of(text: str) -> list[tuple[Block, Block | None]]:
  """The Python blocks of a page, each with the text block right after it, which shows what it prints."""
  blocks, lines = blocks_of(text), text.splitlines()
  follows = lambda one, other: other.language == 'text' and not ''.join(lines[one.end:other.line - 2]).strip()
  return [(one, other if other and follows(one, other) else None)
          for one, other in zip(blocks, [*blocks[1:], None]) if one.language == 'python']


def run(path: Path, text: str) -> Iterator[str]:
  """What each Python block prints, as it has run. Tracebacks name lines of the page."""
  names: dict[str, object] = {'__name__': '__main__'}
  for block, _ in steps_of(text):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(compile('\n' * (block.line - 1) + block.code, str(path), 'exec'), names)
    yield printed.getvalue()


def written(text: str, printed: list[str]) -> str:
  """The page with these prints as its text blocks."""
  lines = text.splitlines()
  for (block, shown), new in reversed([*zip(steps_of(text), printed, strict=True)]):
    fenced = ['```text', *new.rstrip().splitlines(), '```'] if new.strip() else []
    if shown is not None:
      lines[shown.line - 2:shown.end] = fenced
    else:
      lines[block.end:block.end] = fenced
  return '\n'.join(lines) + '\n'


def main(_: None) -> int:
  """Runs --page; returns 1 if a block raised an error."""
  path = expanded(_PAGE.value, '--page').absolute()
  results = writable(_JSON.value, '--json') if _JSON.value else None
  try:
    text = path.read_text('utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError('--page', str(path), f'a Markdown file ({getattr(error, "strerror", None) or error})') from None
  steps, printed, failure = steps_of(text), [], ''
  with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder if _WRITE.value else '.'):
    try:
      for output in run(path, text):
        print(f'# {steps[len(printed)][0].place}\n{output}', end='', flush=True)
        printed.append(output)
    except Exception:
      failure = f'{steps[len(printed)][0].place}: {traceback.format_exc()}'
      print(failure)
    if _WRITE.value and not failure:
      for picture in Path(folder).glob('*.png'):
        (path.parent / 'pictures').mkdir(exist_ok=True)
        shutil.copy(picture, path.parent / 'pictures')
      write_atomic(path, written(text, printed))
  if results:
    write_json(results, {'printed': printed, 'failure': failure})
  return 1 if failure else 0


if __name__ == '__main__':
  configs.run(main, needs_config=False)
