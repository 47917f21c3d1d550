"""Any logged step can be repeated bit by bit; a checkpoint can be inspected and compared without its run."""

import json
import shutil

import numpy as np
import pytest
from commands import run_module
from tiny import config, run, write_text

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints, Contents
from gptjax.config import UserError
from gptjax.training.replaying import replay


@pytest.fixture(scope='module')
def trained(cache):
  settings = config(write_text(cache / 'text.txt'), eval__every=3, model__dropout=0.2, mesh__data=2, zero_stage=3, checkpoint__every=3)
  run(settings, cache / 'run', cache)
  return cache / 'run'


@pytest.mark.parametrize('step, first', [(8, 7), (6, 1)])
def test_repeated_steps_have_the_same_bits(step, first, trained, cache):
  shutil.rmtree(cache / 'copy', ignore_errors=True)
  copy = shutil.copytree(trained, cache / 'copy')
  before = {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()}
  found = list(replay(copy, step, cache))
  assert [one.step for one in found] == [*range(first, step + 1)] and [one.difference for one in found] == [0.0] * len(found)
  assert all({'loss', 'grad_norm', 'learning_rate', 'tokens'} == set(one.again) for one in found)
  assert {path: path.read_bytes() for path in copy.rglob('*') if path.is_file()} == before


def test_a_different_logged_value_is_found(trained, cache, tmp_path):
  copy = shutil.copytree(trained, tmp_path / 'run')
  lines = [json.loads(line) for line in (copy / 'metrics.jsonl').read_text().splitlines()]
  line = next(line for line in lines if line['step'] == 7)
  line['loss'] = float(np.nextafter(np.float32(line['loss']), np.float32(9)))
  (copy / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert [one.difference > 0 for one in replay(copy, 8, cache)] == [True, False]
  with pytest.raises(UserError, match=r'^--step: 99, expected: a logged step: 4, 5, 6, 7, 8$'):
    list(replay(copy, 99, cache))


def test_steps_repeated_on_another_mesh_are_close(trained, cache, tmp_path):
  copy = shutil.copytree(trained, tmp_path / 'run')
  settings = configs.override(configs.read_config(copy), {'mesh.data': 1, 'zero_stage': 0})
  (copy / 'config.json').write_text(configs.to_json(settings))
  assert 0 < max(one.difference for one in replay(copy, 8, cache)) < 1e-5


def test_a_step_is_repeated_with_its_own_config(trained, cache, tmp_path):
  copy = shutil.copytree(trained, tmp_path / 'run')
  settings = configs.override(configs.read_config(copy), {'batch_size': 8, 'optimizer.b1': 0.5})
  (copy / 'config.json').write_text(configs.to_json(settings))  # as it was resumed after step 8
  assert [one.difference for one in replay(copy, 8, cache)] == [0.0, 0.0]


def test_a_step_is_repeated_although_its_data_has_moved(trained, cache, tmp_path):
  copy, text = shutil.copytree(trained, tmp_path / 'run'), cache / 'text.txt'
  moved = text.rename(tmp_path / 'elsewhere.txt')
  try:
    settings = configs.override(configs.read_config(copy), {'data.source.path': str(moved)})
    (copy / 'config.json').write_text(configs.to_json(settings))
    assert [one.difference for one in replay(copy, 8, tmp_path / 'cache')] == [0.0, 0.0]
  finally:
    moved.rename(text)


def test_a_checkpoint_is_read_tensor_by_tensor(trained):
  folder = trained / 'checkpoints' / '8'
  contents = Contents(folder)
  assert {'step', 'trained/tokens/table', 'statistics/mean'} <= set(contents.shapes)
  names = list(contents.shapes)[::-1]
  found = dict(contents.read(names))
  assert list(found) == names and found['step'] == 8
  shapes = {name.removeprefix('trained/'): shape for name, shape in contents.shapes.items() if name.startswith('trained/')}
  parameters = Checkpoints(trained / 'checkpoints').restore_parameters(8, shapes)
  assert all((found[f'trained/{name}'] == np.asarray(value)).all() for name, value in parameters.items())


def test_inspect_checkpoint_describes_and_compares(trained, tmp_path):
  done = run_module('tools.inspect_checkpoint', f'--workdir={trained}')
  assert done.returncode == 0 and done.stdout.count('intact') == 2
  done = run_module('tools.inspect_checkpoint', f'--workdir={trained}', '--step=8')
  assert (done.returncode, done.stderr) == (0, '') and '…' not in done.stdout
  assert {line.split()[1] for line in done.stdout.splitlines() if line.startswith('│')} == {*Contents(trained / 'checkpoints' / '8').shapes}
  done = run_module('tools.inspect_checkpoint', f'--workdir={trained}', '--step=8', '--against=6', '--match=trained/')
  assert done.returncode == 1 and 'trained/tokens/table' in done.stdout and ' 0 of ' in done.stdout
  copy = shutil.copytree(trained, tmp_path / 'run')
  done = run_module('tools.inspect_checkpoint', f'--workdir={trained}', '--step=latest', f'--against={copy}')
  assert done.returncode == 0 and 'tensors bitwise equal' in done.stdout
  (copy / 'checkpoints' / '8' / 'config.json').write_text('{}')
  done = run_module('tools.inspect_checkpoint', f'--workdir={copy}', '--step=8')
  assert done.returncode == 2 and 'config.json has 2 bytes' in done.stderr.splitlines()[-1]
