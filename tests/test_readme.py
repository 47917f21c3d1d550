"""Every command of the README does what it says, in their order."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from commands import run_module
from documented import OUTPUTS, ROOT, WRITES, commands_of, resolve, run

COMMANDS = commands_of('README.md')
PROGRAMS = [line for line in COMMANDS if not line.startswith('make ')]


def test_make_targets_of_the_readme_exist():
  targets = [shlex.split(line)[1] for line in COMMANDS if line.startswith('make ')]
  assert targets == ['train', 'test']
  for target in targets:
    done = subprocess.run(['make', '--dry-run', '--always-make', target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_git_ignores_what_the_commands_of_all_pages_write():
  if not (ROOT / '.git').exists():
    pytest.skip('not a checkout of git')
  lines = [line for page in [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')] for line in commands_of(page)]
  words = [word.partition('=') for line in lines for word in shlex.split(line, comments=True)]
  paths = sorted({value for name, _, value in words if name.strip('-') in (*OUTPUTS, *WRITES.values()) and not value.isdecimal()})
  assert len(paths) > 15
  ignored = subprocess.run(['git', 'check-ignore', *paths], cwd=ROOT, capture_output=True, text=True).stdout.split()
  assert ignored == paths


def test_commands_of_the_readme_resolve():
  assert len(PROGRAMS) >= 5
  resolve(PROGRAMS)


def test_commands_for_networks_and_accelerators_parse(tmp_path):
  for line in commands_of('README.md', 'bash'):
    _, _, module, *arguments = shlex.split(line)
    assert module.partition('.')[0] in ('gptjax', 'tools'), line
    arguments = [argument for argument in arguments if not argument.startswith('--config.init_from')]
    done = run_module(module, *arguments, only_parse=True)
    assert done.returncode == 0, f'{line}\n{done.stderr}'


def test_links_of_all_pages_lead_somewhere():
  for page in [ROOT / 'README.md', *(ROOT / 'docs').glob('**/*.md'), *(ROOT / 'experiments').glob('**/*.md')]:
    for link in re.findall(r'\]\(([^)#\s]+)(?:#[^)\s]*)?\)', page.read_text()):
      assert '://' in link or (page.parent / link).exists(), f'{page.relative_to(ROOT)}: {link}'


@pytest.mark.full
def test_commands_of_the_readme_run_as_written(tmp_path):
  printed = run(PROGRAMS, tmp_path)
  assert (tmp_path / 'runs/first/report.html').stat().st_size > 10_000
  steps = [json.loads(line) for line in (tmp_path / 'runs/first/metrics.jsonl').read_text().splitlines()]
  rates = [step['learning_rate'] for step in steps if 'loss' in step]
  assert 0 < rates[-1] < max(rates) and steps[-1]['eval/valid/loss'] < 2.4  # beyond warmup, and words: 4.4 nats for random characters
  assert (tmp_path / 'runs/mesh/metrics.jsonl').exists() and len(printed) == len(PROGRAMS)
  notebook = '\n'.join([*commands_of('README.md', 'python'), 'print(len(out.attentions), out.logits.shape)'])
  done = subprocess.run([sys.executable, '-c', notebook], cwd=tmp_path, capture_output=True, text=True)
  assert done.returncode == 0 and '\n1 (1, 11, ' in done.stdout, done.stderr
