"""Every command of the README and of the guides does what they say, in their order."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def commands_of(page, language='sh'):
  blocks = re.findall(rf'^```{language}\n(.*?)^```', (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
  return [line for block in blocks for line in block.splitlines()]


COMMANDS = commands_of('README.md')


def test_make_targets_of_the_readme_exist():
  targets = [shlex.split(line)[1] for line in COMMANDS if line.startswith('make ')]
  assert targets == ['train', 'test']
  for target in targets:
    done = subprocess.run(['make', '--dry-run', '--always-make', target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(commands, folder):
  """Runs commands as they are written, in a folder that looks like this repository; returns what each one printed."""
  for name in ('gptjax', 'tools', 'configs', 'LICENSE', 'README.md'):
    (folder / name).symlink_to(ROOT / name)
  # The caches of a home folder that tests may fill; compiled programs are shared with the other tests of this machine.
  environment = {**os.environ, 'HOME': str(ROOT / '.jax_cache' / 'home'),
                 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}  # the python of commands within commands
  printed = {}
  for command in commands:
    program, *arguments = shlex.split(command)
    assert program == 'python', command
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stderr}'
    printed[command] = done.stdout
  return printed


def test_commands_of_the_readme_run_as_written(tmp_path):
  commands = [line for line in COMMANDS if not line.startswith('make ')]
  assert len(commands) >= 9
  printed = run(commands, tmp_path)
  assert (tmp_path / 'runs/first/report.html').stat().st_size > 10_000
  assert any('model.layers = 12' in text for text in printed.values()) and (tmp_path / 'runs/mesh/metrics.jsonl').exists()
  assert (tmp_path / 'stores/first/manifest.json').exists()


def test_commands_of_the_guide_to_data_run_as_written(tmp_path):
  printed = list(run(commands_of('docs/data.md'), tmp_path).values())
  assert len(printed) == 8 and 'bytes per token' in printed[0]
  assert 'verified: all 1 shards' in printed[4] and 'stores/readme' in printed[5] and '0.2500' in printed[5]
  assert (tmp_path / 'mixture.png').read_bytes().startswith(b'\x89PNG')
  score = json.loads(printed[7].splitlines()[-1])
  assert {*score['sets']} == {'licence', 'readme'} and {*score['tags']} == {'law'}


def test_commands_of_the_guide_to_clusters_run_as_written(tmp_path):
  commands = commands_of('docs/clusters.md')
  assert len(commands) == 5
  run(commands, tmp_path)
  scores = [[json.loads(line)['eval/valid/loss'] for line in file.read_text().splitlines() if 'eval/valid/loss' in line]
            for file in sorted((tmp_path / 'runs').glob('*/metrics.jsonl'))]
  assert len(scores) == sum('gptjax.train' in command for command in commands)
  assert scores[0] and all(score == pytest.approx(scores[0], rel=1e-5) for score in scores)


def test_commands_for_clusters_name_what_is_there():
  commands = commands_of('docs/clusters.md', 'bash')
  named = {path for command in commands for path in re.findall(r'\b(?:tools|configs)/[\w/.]+\w', command)}
  assert named >= {'tools/launch/slurm.sbatch', 'tools/launch/jobset_tpu.yaml', 'tools/launch/tpu_vm.sh', 'configs/llama_1b.py'}
  assert all((ROOT / path).is_file() for path in named)
  linked = re.findall(r'\]\(\.\./(\S+?)\)', (ROOT / 'docs/clusters.md').read_text())
  assert linked and all((ROOT / path).is_file() for path in linked)


def test_recipes_of_the_readme_are_those_of_the_folder():
  listed = set(re.findall(r'`(configs/\w+\.py)`', (ROOT / 'README.md').read_text()))
  assert listed == {f'configs/{path.name}' for path in (ROOT / 'configs').glob('*.py')}
