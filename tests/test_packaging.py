"""The package installs as a wheel that has everything and claims one name, and runs from any folder."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
from commands import ROOT
from documented import commands_of


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """A folder with the wheel of this checkout, as installed; its dependencies are those of the tests."""
  source, folder = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('installed')
  for name in ('gptjax', 'tools', 'configs'):  # a build writes beside its sources
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('setup.py', 'pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  offline = ('--no-deps', '--no-build-isolation', '--no-index')
  done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', *offline, '--wheel-dir', source, source], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  [wheel] = source.glob('*.whl')
  with zipfile.ZipFile(wheel) as file:
    file.extractall(folder)
  return folder


def run(installed, folder, *command):
  environment = {**os.environ, 'PYTHONPATH': str(installed), 'HOME': str(ROOT / '.jax_cache' / 'home')}
  return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.full
def test_a_wheel_has_every_file_and_claims_one_name(installed):
  assert [path.name for path in installed.iterdir() if path.suffix != '.dist-info'] == ['gptjax']
  for part, home in (('gptjax', ''), ('tools', 'gptjax'), ('configs', 'gptjax')):
    files = [path.relative_to(ROOT) for path in (ROOT / part).rglob('*') if path.is_file() and path.suffix != '.pyc']
    assert len(files) > 10 and [path for path in files if not (installed / home / path).is_file()] == []
  [metadata] = installed.glob('*.dist-info/METADATA')
  wanted = [line.split()[0] for line in (ROOT / 'requirements.txt').read_text().splitlines() if line[0] != '#']
  assert [line.split()[1] for line in metadata.read_text().splitlines() if line.startswith('Requires-Dist: ')] == wanted


@pytest.mark.full
def test_an_installed_program_runs_from_an_empty_folder(installed, tmp_path):
  programs = ['gptjax.train', 'gptjax.evaluate', 'gptjax.classify', 'gptjax.generate', 'gptjax.plan', 'gptjax.sweep', 'gptjax.serve']
  tools = [f'gptjax.tools.{path.stem}' for path in (ROOT / 'tools').glob('*.py') if "__name__ == '__main__'" in path.read_text()]
  for name in [*programs, *tools, 'gptjax.tools.launch.local']:
    done = run(installed, tmp_path, '-m', name, '--help')
    assert done.returncode == 0 and done.stdout.startswith(f'usage: python -m {name} ') and not done.stderr, done.stderr
  shown = run(installed, tmp_path, '-m', 'gptjax.train', '--config=configs/gpt2_124m.py', '--print_config')
  assert 'model.layers = 12' in shown.stdout, shown.stderr
  wrong = run(installed, tmp_path, '-m', 'gptjax.train', '--config=configs/gpt2_124n.py')
  assert wrong.stderr.endswith('did you mean configs/gpt2_124m.py?\n') and not list(tmp_path.iterdir())


@pytest.mark.full
def test_the_examples_of_the_library_run_from_an_empty_folder(installed, tmp_path):
  done = run(installed, tmp_path, '-c', '\n'.join(commands_of('docs/library.md', 'python')))
  assert done.returncode == 0, done.stderr
  printed = done.stdout.splitlines()
  assert printed[0].startswith('after 50 steps: ') and any(line.endswith(' bits per byte of held-out text') for line in printed)
  assert '(1, 20, 259) (1, 20, 96) (1, 4, 20, 20)' in printed
  (tmp_path / 'examples').mkdir()
  for path in (ROOT / 'examples').glob('own_*.py'):
    shutil.copy(path, tmp_path / 'examples')
  shutil.copy(ROOT / 'LICENSE', tmp_path)
  for command in map(shlex.split, commands_of('docs/library.md')):
    done = run(installed, tmp_path, *command[1:])
    assert command[0] == 'python' and done.returncode == 0, done.stderr
  (tmp_path / 'examples/own_objective.py').unlink()
  done = run(installed, tmp_path, '-m', 'gptjax.evaluate', '--workdir=runs/own_objective')
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
    "error: objective.kind: 'examples.own_objective:make_focal', expected: ")
