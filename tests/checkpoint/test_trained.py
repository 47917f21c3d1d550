"""A trained model is loaded from its workdir alone, onto the devices that are present."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints, Progress, Retention, load_trained
from gptjax.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, UserError
from gptjax.model import abstract_model

# What Orbax was still reading when it failed.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

MODEL = ModelConfig(layers=1, width=32, heads=4, vocab_size=50)


@pytest.fixture
def workdir(tmp_path):
  """A function (mesh.model): a run's folder with checkpoints of steps 3 and 5, the earlier the better."""
  def make(model_axis):
    config = Config(model=MODEL, data=DataConfig(context=16), mesh=MeshConfig(model=model_axis), zero_stage=3)
    (tmp_path / 'config.json').write_text(configs.to_json(config))
    checkpoints = Checkpoints(tmp_path / 'checkpoints', Retention(latest=2))
    for step, loss in ((3, 1.0), (5, 2.0)):
      state = {'trained': parameters(step), 'optimizer': {'mu': np.zeros(1000)}, 'step': np.array(step)}
      checkpoints.save(Progress(step), state, loss)
    checkpoints.close()
    return tmp_path
  return make


def parameters(seed):
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(s.shape, np.float32) for name, s in abstract_model(MODEL, ComputeConfig(), 16).shapes.items()}


@pytest.mark.parametrize('model_axis, expected', [(1, 1), (2, 2), (3, 1)])
def test_parameters_are_placed_on_all_devices(workdir, model_axis, expected):
  trained = load_trained(workdir(model_axis))
  assert trained.step == 5 and dict(trained.mesh.shape) == MeshConfig(data=8 // expected, model=expected).sizes
  assert trained.config.model == trained.model.config == MODEL and trained.model.context == 16
  assert all((np.array(trained.parameters[name]) == value).all() for name, value in parameters(5).items())
  # Heads over `model`; over `data`, which training shared them out on, each device has all.
  assert trained.parameters['blocks/0/attention/q/kernel'].sharding.spec == PartitionSpec(None, 'model' if expected > 1 else None)
  assert f'restored step 5; 8 cpu, mesh data {8 // expected} x model {expected}' in trained.description


def test_a_step_is_chosen_by_name_or_number(workdir):
  folder = workdir(1)
  assert [load_trained(folder, step).step for step in ('latest', 'best', '3')] == [5, 3, 3]
  with pytest.raises(UserError, match="^--step: '4', expected: latest, best, 3, 5"):
    load_trained(folder, '4')


@pytest.mark.parametrize('part, step', [('training', 5), ('parameters', 3)])
def test_only_damage_of_what_is_loaded_matters(part, step, workdir):
  folder = workdir(1)
  file = max((folder / 'checkpoints' / '5' / part).rglob('d/*'), key=lambda path: path.stat().st_size)
  file.write_bytes(file.read_bytes()[:-1] + b'?')
  assert load_trained(folder).step == step
  assert Checkpoints(folder / 'checkpoints').newest() == 3  # which a run resumes from


def test_a_folder_without_a_run_is_an_error_and_not_changed(workdir, tmp_path):
  with pytest.raises(UserError, match=r"^--workdir: '.*nothing', expected: a folder that gptjax.train made"):
    load_trained(tmp_path / 'nothing')
  assert not list(tmp_path.iterdir())
  (tmp_path / 'config.json').write_text(configs.to_json(Config(model=MODEL)))
  with pytest.raises(UserError, match='^--workdir: .*, expected: a folder with checkpoints'):
    load_trained(tmp_path)


def test_parameters_of_another_config_are_a_one_line_error(workdir):
  folder = workdir(1)
  config = configs.from_json((folder / 'config.json').read_text())
  for model in (dataclasses.replace(MODEL, width=64), dataclasses.replace(MODEL, layers=2)):
    (folder / 'config.json').write_text(configs.to_json(dataclasses.replace(config, model=model)))
    with pytest.raises(UserError, match=r"^checkpoint: '.*/5', expected: an intact checkpoint of this config; it ") as caught:
      load_trained(folder)
    assert '\n' not in str(caught.value)
