"""A run may start with another's weights: all of them, or the parts that fit; everything else is its own."""

import numpy as np
import pytest
from tiers import full
from tiny import config, options, records, run, write_text

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints
from gptjax.config import MeshConfig, UserError
from gptjax.data import prepare
from gptjax.sharding import make_mesh
from gptjax.training import resolve, train
from gptjax.training.workdir import initial_state

import jax


@pytest.fixture(scope='module')
def settings(cache):
  return config(write_text(cache / 'text.txt'), steps=3, eval__every=0, model__layers=3, model__positions='learned', model__tied=False,
                model__vocab_multiple=8)


@pytest.fixture(scope='module')
def source(settings, cache):
  """The workdir of a run of 3 steps."""
  run(settings, cache / 'source', cache)
  return cache / 'source'


def begun(settings, cache, mesh=MeshConfig(1, 1)):
  """The state that a run begins with, on the host, and its description."""
  mesh = make_mesh(mesh)
  with jax.set_mesh(mesh):
    data = prepare(settings.data, cache)
    state, words = initial_state(resolve(settings, data, mesh), data.tokenizer)
    return jax.device_get(state), words


@pytest.fixture(scope='module')
def weights(settings, source, cache):
  return begun(configs.override(settings, {'init_from': str(source)}), cache)[0].trained


def test_all_weights_are_taken_and_nothing_else(settings, source, cache, weights, tmp_path, capsys):
  fresh, words = begun(settings, cache)
  assert words == 'fresh parameters'
  state, words = begun(configs.override(settings, {'init_from': str(source / 'checkpoints' / '3')}), cache)
  assert words == f'parameters of {source}/checkpoints/3, step 3'
  assert state.step == 0 and all((state.trained[name] == weights[name]).all() for name in fresh.trained)
  assert any((state.trained[name] != fresh.trained[name]).any() for name in fresh.trained)
  assert all((a == b).all() for a, b in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(fresh.optimizer)))
  settings = configs.override(settings, {'init_from': str(source), 'data.valid_fraction': 0.2})  # the step of the other, on other rows
  lines = run(settings, tmp_path, cache)
  assert lines[0]['step'] == 1 and lines[0]['loss'] < records(source)[0]['loss']
  assert f'parameters of {source}, step 3' in capsys.readouterr().err
  # It resumes as itself, whatever became of the other.
  assert train(settings, options(tmp_path, cache)) == 0


@pytest.mark.parametrize('mesh, zero_stage', [full(MeshConfig(1, 1), 0), (MeshConfig(4, 2), 3)])
def test_layers_may_be_stacked_or_not_and_on_any_mesh(mesh, zero_stage, settings, source, cache, weights):
  changed = configs.override(settings, {'init_from': str(source), 'compute.scan': True, 'zero_stage': zero_stage, 'batch_size': 8,
                                        'mesh.max_unsharded': 1.0})
  state, _ = begun(changed, cache, mesh)
  for name, value in state.trained.items():
    one_by_one = [weights[name.replace('blocks/', f'blocks/{i}/')] for i in range(3)] if name.startswith('blocks/') else weights[name]
    assert (value == np.stack(one_by_one) if name.startswith('blocks/') else value == one_by_one).all()


@pytest.mark.parametrize('mesh, scan', [full(MeshConfig(1, 1), False), (MeshConfig(4, 2), True)])
def test_parts_that_fit_are_taken_and_the_rest_is_fresh(mesh, scan, settings, source, cache, weights):
  values = {'model.layers': 2, 'model.vocab_size': 49, 'data.context': 32, 'compute.scan': scan, 'mesh.max_unsharded': 1.0, 'batch_size': 8}
  changed = configs.override(settings, values | {'init_from': str(source)})
  with pytest.raises(UserError, match='^init_from: .*init_partial for the parts that fit: (.*tokens/table|blocks)'):
    begun(changed, cache, mesh)
  fresh = begun(configs.override(settings, values), cache, mesh)[0].trained
  state, words = begun(configs.override(changed, {'init_partial': True}), cache, mesh)
  assert 'in part: ' in words
  table = state.trained['tokens/table']
  assert (table[:32] == weights['tokens/table']).all() and (table[32:] == fresh['tokens/table'][32:]).all()
  positions = state.trained['positions/table']
  assert (positions[:16] == weights['positions/table']).all() and (positions[16:] == fresh['positions/table'][16:]).all()
  up = state.trained['blocks/mlp/up/kernel' if scan else 'blocks/1/mlp/up/kernel']
  assert (up[1] == weights['blocks/1/mlp/up/kernel'] if scan else up == weights['blocks/1/mlp/up/kernel']).all()


def test_another_width_is_an_error(settings, source, cache):
  changed = configs.override(settings, {'model.width': 32, 'init_from': str(source), 'init_partial': True})
  with pytest.raises(UserError, match='^init_from: .*expected: the same sizes; only vocabulary, positions and the number of layers may '
                     'differ$'):
    begun(changed, cache)


def test_another_tokenizer_is_an_error(settings, source, cache):
  changed = configs.override(settings, {'data.tokenizer.kind': 'bytes', 'model.vocab_size': 512, 'init_from': str(source)})
  with pytest.raises(UserError, match='^init_from: .*another tokenizer, of 32 ids .data.tokenizer.path=.*source.data.tokenizer'):
    begun(changed, cache)


@pytest.mark.parametrize('path', ['nowhere', 'empty'])
def test_a_folder_without_a_run_is_an_error(path, settings, cache, tmp_path):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='^init_from: '):
    begun(configs.override(settings, {'init_from': str(tmp_path / path)}), cache)


def test_a_missing_run_whose_template_is_needed_is_an_error(settings, cache, tmp_path):
  changed = configs.override(settings, {'init_from': str(tmp_path / 'gone'), 'objective.kind': 'sft', 'data.rows': 'pack',
                                        'data.source.messages': 'messages', 'data.source.chat': 'template'})
  with pytest.raises(UserError, match='^init_from: .*gone.*a chat template'):
    train(changed, options(tmp_path / 'run', cache))
  assert not (tmp_path / 'run').exists()


def test_a_damaged_checkpoint_is_an_error(settings, source, cache, tmp_path):
  import shutil
  copy = shutil.copytree(source, tmp_path / 'copy')
  (copy / 'checkpoints' / '3' / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='config.json'):
    begun(configs.override(settings, {'init_from': str(copy / 'checkpoints' / '3')}), cache)
  assert Checkpoints(source / 'checkpoints').newest() == 3


def test_a_model_may_lack_special_ids_that_no_text_has(settings, cache):
  with jax.set_mesh(mesh := make_mesh(MeshConfig(1, 1))):
    data = prepare(settings.data, cache)
    size = data.tokenizer.vocab_size
    data.tokenizer.pieces += (b'',)
    assert resolve(configs.override(settings, {'model.vocab_size': size}), data, mesh).model.config.vocab_size == size
    with pytest.raises(UserError, match=f'^model.vocab_size: {size - 1}, expected: 0, or at least {size} for the ids of the tokenizer'):
      resolve(configs.override(settings, {'model.vocab_size': size - 1}), data, mesh)
