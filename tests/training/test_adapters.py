"""Adapters: at the start the model is its base bit by bit; they alone are trained and saved; runs are equal on all meshes and resume."""

import shutil

import jax
import numpy as np
import pytest
from tiers import full
from tiny import config, options, records, run, write_text

from gptjax import config as configs
from gptjax.checkpoint import Contents, Restorer
from gptjax.config import UserError
from gptjax.data import prepare
from gptjax.evaluation import Scorer
from gptjax.interop import merge_adapters
from gptjax.sharding import make_mesh
from gptjax.training import make_objective, resolve, train
from gptjax.training.workdir import initial_state

LORA = {'lora.rank': 2, 'lora.targets': ('blocks/*/attention/*/kernel', 'blocks/*/mlp/up/kernel'), 'lora.stabilized': True}


@pytest.fixture(scope='module')
def source(cache):
  """The config and the workdir of a run of 3 steps."""
  settings = config(write_text(cache / 'text.txt'), steps=3, eval__every=0, model__layers=2, batch_size=8)
  run(settings, cache / 'source', cache)
  return settings, cache / 'source'


@pytest.fixture(scope='module')
def adapted(source, cache):
  """The config and the workdir of a run of 4 steps with adapters, and its records. The base's run is gone."""
  settings, folder = source
  shutil.copytree(folder, cache / 'moved')
  settings = configs.override(settings, {**LORA, 'init_from': str(cache / 'moved'), 'steps': 4, 'checkpoint.every': 2})
  found = run(settings, cache / 'adapted', cache)
  shutil.rmtree(cache / 'moved')
  return settings, cache / 'adapted', found


def test_the_model_begins_as_its_base_and_only_adapters_change_and_are_saved(source, adapted, cache, tmp_path):
  (settings, folder), (_, workdir, found) = source, adapted
  whole = run(configs.override(settings, {'init_from': str(folder)}), tmp_path / 'whole', cache, stop_at=1)
  assert found[0]['loss'] == whole[0]['loss'] and found[0]['loss'] != found[2]['loss']
  names = [name for name in Contents(workdir / 'checkpoints' / '4').shapes if name.startswith(('trained', 'frozen'))]
  assert len(names) == 2 * 5 * 2 and all(name.endswith(('/lora_a', '/lora_b')) for name in names)
  base, merged = (Restorer(one).restore(3 + (one is workdir)).parameters for one in (folder, workdir))
  changed = {name for name in base if not (base[name] == merged[name]).all()}
  assert base.keys() == merged.keys()
  assert changed == {f'blocks/{i}/{name}/kernel' for i in (0, 1)
                     for name in ('attention/q', 'attention/k', 'attention/v', 'attention/out', 'mlp/up')}


def test_merged_parameters_score_as_the_adapters_did(adapted, cache, tmp_path):
  settings, workdir, found = adapted
  merge_adapters(workdir, tmp_path / 'merged')
  rows = prepare(settings.data, cache).valid_rows['valid']
  for folder, step in ((workdir, 4), (tmp_path / 'merged', 0)):
    restorer = Restorer(folder)
    with jax.set_mesh(restorer.mesh):
      scorer = Scorer(restorer.model, make_objective(settings), restorer.mesh, 8)
      assert scorer(restorer.restore(step).parameters, rows).loss == pytest.approx(found[-1]['eval/valid/loss'], rel=1e-6)


LAYOUTS = [
  {'mesh.data': 2, 'mesh.model': 2, 'mesh.pipe': 2, 'zero_stage': 3, 'microbatches': 2}, full({'mesh.data': 4, 'zero_stage': 1}),
  full({'mesh.data': 2, 'mesh.context': 2, 'zero_stage': 2, 'compute.scan': True}),
  full({'mesh.model': 2, 'compute.sequence_parallel': True, 'compute.remat': 'full'})]


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
def test_another_layout_trains_equally_and_goes_on_from_a_checkpoint(layout, source, adapted, cache, tmp_path):
  settings, workdir, found = adapted
  settings = configs.override(settings, {'mesh.data': 1, 'mesh.max_unsharded': 1.0, **layout, 'init_from': str(source[1])})
  begun = run(settings, tmp_path / 'other', cache, stop_at=2)
  rest = run(configs.override(adapted[0], {'init_from': str(source[1])}), tmp_path / 'other', cache)  # on one device again
  for one, other in zip(rest, found, strict=True):
    assert {name: value for name, value in one.items() if name != 'step'} == pytest.approx(
      {name: value for name, value in other.items() if name != 'step'}, rel=2e-5)
  assert begun == rest[:len(begun)]


def test_a_stopped_run_goes_on_bit_by_bit(source, adapted, cache, tmp_path):
  settings, workdir, found = adapted
  settings = configs.override(settings, {'init_from': str(source[1])})
  run(settings, tmp_path / 'run', cache, stop_at=3)
  assert run(settings, tmp_path / 'run', cache) == found
  one, other = (Contents(folder / 'checkpoints' / '4') for folder in (workdir, tmp_path / 'run'))
  for (name, a), (_, b) in zip(one.read([*one.shapes]), other.read([*other.shapes]), strict=True):
    assert np.array_equal(a, b), name


def test_another_run_goes_on_with_the_adapters_or_with_them_merged(adapted, cache):
  settings, workdir, _ = adapted
  mesh = make_mesh(settings.mesh)
  merged = Restorer(workdir).restore(4).parameters
  with jax.set_mesh(mesh):
    data = prepare(settings.data, cache)
    for changes in ({}, {'lora.rank': 0, 'lora.targets': ('blocks/*/kernel',), 'lora.stabilized': False}):
      new = resolve(configs.override(settings, {**changes, 'init_from': str(workdir)}), data, mesh)
      found = new.model.merged(initial_state(new, data.tokenizer)[0].parameters)
      assert all(np.array_equal(found[name], merged[name]) for name in merged)
    with pytest.raises(UserError, match='init_from: .* expected: a run without adapters'):
      initial_state(resolve(configs.override(settings, {'lora.rank': 3, 'init_from': str(workdir)}), data, mesh), data.tokenizer)


@pytest.mark.parametrize('values, words', [
  ({'init_from': ''}, "init_from: '', expected: the run"),
  ({'lora.targets': ()}, 'lora.targets: .*, expected: patterns'),
  ({'lora.rank': 0}, 'lora.stabilized: True, expected: its default'),
  ({'frozen': ('tokens/*',)}, 'frozen: .*with lora.rank'),
  ({'init_partial': True}, 'init_partial: True, expected: its default'),
  ({'optimizer.name': 'muon'}, "optimizer.name: 'muon', expected: adamw"),
  ({'lora.targets': ('blocks/*/attenton/*',)}, "lora.targets: 'blocks/\\*/attenton/\\*'.*did you mean blocks/"),
  ({'lora.targets': ('tokens/*',)}, "lora.targets: 'tokens/\\*', expected: a pattern that matches matrices of linear layers")])
def test_mistakes(values, words, adapted, cache, tmp_path):
  with pytest.raises(UserError, match=words):
    train(configs.override(adapted[0], values), options(tmp_path / 'run', cache))


def test_a_resumed_run_keeps_its_adapters_and_needs_its_base(adapted, cache, tmp_path):
  settings, workdir, _ = adapted
  shutil.copytree(workdir, tmp_path / 'run')
  with pytest.raises(UserError, match='lora.rank: 3, expected: 2, with which this workdir was started'):
    train(configs.override(settings, {'lora.rank': 3, 'steps': 5}), options(tmp_path / 'run', cache, accept_changes=True))
  shutil.rmtree(tmp_path / 'run' / 'base')
  with pytest.raises(UserError, match='base'):
    Restorer(tmp_path / 'run').restore(4)
  assert records(workdir)
