"""Every command of the README does what the README says, in the order of the README."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r'^```sh\n(.*?)^```', (ROOT / 'README.md').read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def test_make_targets_of_the_readme_exist():
  targets = [shlex.split(line)[1] for line in COMMANDS if line.startswith('make ')]
  assert targets == ['train', 'test']
  for target in targets:
    done = subprocess.run(['make', '--dry-run', '--always-make', target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_commands_of_the_readme_run_as_written(tmp_path):
  commands = [line for line in COMMANDS if not line.startswith('make ')]
  assert len(commands) >= 6
  for name in ('gptjax', 'tools', 'configs', 'LICENSE'):
    (tmp_path / name).symlink_to(ROOT / name)
  # The caches of a home folder that tests may fill; compiled programs are shared with the other tests of this machine.
  environment = {**os.environ, 'HOME': str(ROOT / '.jax_cache' / 'home')}
  for command in commands:
    program, *arguments = shlex.split(command)
    assert program == 'python', command
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stderr}'
  assert (tmp_path / 'runs/first/report.html').stat().st_size > 10_000
  assert 'model.layers = 12' in done.stdout or (tmp_path / 'runs/mesh/metrics.jsonl').exists()


def test_recipes_of_the_readme_are_those_of_the_folder():
  listed = set(re.findall(r'`(configs/\w+\.py)`', (ROOT / 'README.md').read_text()))
  assert listed == {f'configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
