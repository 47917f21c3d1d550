"""Pipeline stages give one device's losses and gradients, whatever the schedule, and leave no trace in checkpoints."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from tiers import full

import tiny
from gptjax import config as configs
from gptjax.checkpoint import by_name
from gptjax.config import (
  ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, PipelineConfig,
  RouterConfig, UserError)
from gptjax.model import model_of, stored_model, unstack_layers
from gptjax.model.layout import deal_layers
from gptjax.sharding import make_mesh
from gptjax.training import abstract, initializer, make_optimizer
from gptjax.training.standard import Standard

MODEL = ModelConfig(layers=3, width=16, heads=4, kv_heads=2, vocab_size=50, dropout=0.1)
MODERN = dataclasses.replace(MODEL, layers=5, norm='rmsnorm', mlp='swiglu', positions='rope', window=5, global_every=2, bias=False,
                             tied=False)
EXPERTS = dataclasses.replace(MODEL, experts=4, experts_per_token=2, expert_width=8, router=RouterConfig(bias=True, balance_loss=0.01))


def losses(mesh, pipeline=PipelineConfig(), model=MODEL, **values):
  with jax.set_mesh(make_mesh(mesh)):
    state, step = tiny.trainer(model, pipeline=pipeline, **values)
    found = []
    for seed in range(2):
      state, metrics = step(state, tiny.put(tiny.batch(8, seed=seed)))
      found.append((float(metrics['loss']), float(metrics['grad_norm']), float(metrics['targets'])))
    return found


@functools.cache
def losses_of_one_device(model, optimizer):
  return losses(MeshConfig(data=1), model=model, optimizer=optimizer, compute=ComputeConfig(scan=True))  # one layer to compile


def assert_like_one_device(mesh, pipeline, model=MODEL, optimizer=None, **values):
  found = losses(mesh, pipeline, model, optimizer=optimizer, **values)
  for (loss, norm, targets), (other, other_norm, others) in zip(losses_of_one_device(model, optimizer), found, strict=True):
    tolerance = 1e-4 if optimizer else 1e-5
    assert other == pytest.approx(loss, rel=tolerance) and other_norm == pytest.approx(norm, rel=1e-4) and targets == others


def test_stages_give_the_losses_of_one_device():
  """Gradients of weights apart, at a ZeRO stage that reduces them with every microbatch, with layers that the stages do not divide."""
  assert_like_one_device(MeshConfig(data=2, pipe=2), PipelineConfig('ZBH1'), zero_stage=2, microbatches=4, compute=ComputeConfig(scan=True))


@pytest.mark.full
@pytest.mark.parametrize('mesh, pipeline, model, values', [
  ({'data': 2, 'pipe': 2, 'model': 2}, PipelineConfig('1F1B'), MODEL,
   {'zero_stage': 3, 'microbatches': 2, 'compute': ComputeConfig(scan=True, remat='dots', sequence_parallel=True)}),
  ({'data': 2, 'pipe': 2, 'replica': 2}, PipelineConfig('Interleaved1F1B', 2), MODERN, {'zero_stage': 1, 'microbatches': 2}),
  ({'data': 1, 'pipe': 4, 'model': 2}, PipelineConfig('GPipe'), MODERN, {'microbatches': 2, 'compute': ComputeConfig(remat='full')}),
  ({'data': 2, 'pipe': 2}, PipelineConfig('ZBH1'), MODEL, {'zero_stage': 3, 'optimizer': OptimizerConfig(name='muon')}),
  ({'data': 1, 'pipe': 2, 'context': 2, 'expert': 2}, PipelineConfig('ZBH1'), EXPERTS,
   {'microbatches': 4, 'compute': ComputeConfig(scan=True)}),
], ids=['1F1B', 'Interleaved1F1B', 'GPipe', 'muon', 'context and experts'])
def test_every_schedule_gives_the_losses_of_one_device(mesh, pipeline, model, values):
  assert_like_one_device(MeshConfig(**mesh), pipeline, model, **values)


@pytest.mark.parametrize('layers, stages, chunks, head, slots', [
  (4, 2, 1, 0.5, (0, 1, 2, 3)),
  (5, 2, 1, 0.5, (0, 1, 2, 3, 4, -1)),
  (4, 2, 2, 0.5, (0, 2, 1, 3)),  # stage 0 has chunks 0 and 2
  (6, 2, 1, 2.5, (0, 1, 2, 3, 4, 5, -1, -1)),  # the head is worth two layers
  (5, 2, 2, 0.5, (0, 1, 3, -1, 2, -1, 4, -1)),
])
def test_the_stage_with_the_most_work_has_as_little_as_possible(layers, stages, chunks, head, slots):
  assert deal_layers(layers, stages, chunks, head) == slots


LAYOUTS = {
  'one device': ({'data': 1}, {}), 'scan': ({'data': 4}, {'compute.scan': True, 'zero_stage': 3}),
  'uneven': ({'data': 2, 'pipe': 2}, {'zero_stage': 1}), 'even': ({'data': 1, 'pipe': 5}, {'pipeline.schedule': 'ZBH1'}),
  'chunks': ({'data': 2, 'pipe': 2, 'model': 2}, {'pipeline.schedule': 'Interleaved1F1B', 'pipeline.chunks': 2, 'zero_stage': 2})}


def layout(name):
  mesh, values = LAYOUTS[name]
  config = Config(model=dataclasses.replace(MODEL, layers=5), mesh=MeshConfig(**mesh), data=DataConfig(context=8))
  return configs.override(config, values), make_mesh(config.mesh)


def per_layer(config, state):
  return unstack_layers({name: np.asarray(jax.device_get(value)) for name, value in by_name(state).items()}, model_of(config).slots)


@pytest.mark.parametrize('before, after', [
  ('one device', 'chunks'), ('chunks', 'scan'), full('one device', 'uneven'), full('uneven', 'chunks'), full('chunks', 'even'),
  full('even', 'one device'), full('scan', 'chunks')])
def test_a_state_is_the_same_in_every_layout(before, after):
  optimizer = make_optimizer(OptimizerConfig())
  old, old_mesh = layout(before)
  with jax.set_mesh(old_mesh):
    state = initializer(model_of(old), optimizer, old.zero_stage, old_mesh, 0)()
    saved = Standard(old, old_mesh, optimizer).saved(state)
  found = {name: np.asarray(jax.device_get(value)) for name, value in by_name(saved).items()}
  new, new_mesh = layout(after)
  with jax.set_mesh(new_mesh):
    standard = Standard(new, new_mesh, optimizer)
    wanted = abstract(initializer(model_of(new), optimizer, new.zero_stage, new_mesh, 0), new_mesh)
    target = by_name(standard.abstract_state(stored_model(old)))
    arrays = {name: jax.device_put(found[name], target[name].sharding) for name in found}
    entered = standard.enter(arrays, wanted)
    ours, theirs = per_layer(new, entered), per_layer(old, state)
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    np.testing.assert_array_equal(ours[name], value, err_msg=name)


@pytest.mark.full
def test_a_run_goes_on_with_other_stages(tmp_path):
  text = tiny.write_text(tmp_path / 'text')
  settings = functools.partial(tiny.config, text, model__layers=5, model__dropout=0.1, microbatches=2, checkpoint__every=4,
                               eval__sample_tokens=4)
  straight = tiny.run(settings(), tmp_path / 'straight', tmp_path / 'cache')
  tiny.run(settings(mesh__pipe=2, mesh__data=2, pipeline__schedule='Interleaved1F1B', pipeline__chunks=2), tmp_path / 'changed',
           tmp_path / 'cache', stop_at=4)
  changed = tiny.run(settings(mesh__pipe=4, pipeline__schedule='ZBH1', zero_stage=1), tmp_path / 'changed', tmp_path / 'cache')
  assert [line['step'] for line in changed] == [line['step'] for line in straight]
  for ours, theirs in zip(changed, straight, strict=True):
    for name, value in theirs.items():
      assert ours[name] == pytest.approx(value, rel=2e-4 if 'norm' in name else 2e-5), name


def test_more_stages_than_layers_are_refused():
  with pytest.raises(UserError, match=r'^mesh\.pipe: 4, expected: at most model\.layers=3 '):
    model_of(Config(model=MODEL, mesh=MeshConfig(pipe=4)))
  with pytest.raises(UserError, match=r'^pipeline\.chunks: 2, expected: at most model\.layers=3 '):
    model_of(Config(model=MODEL, mesh=MeshConfig(pipe=2), pipeline=PipelineConfig('Interleaved1F1B', 2)))
  with pytest.raises(UserError, match=r"^pipeline\.chunks: 2, expected: 1 unless pipeline\.schedule is 'Interleaved1F1B'"):
    PipelineConfig('ZBH1', 2)
