"""Losses on pairs of answers have the values of their papers and of other libraries, on all meshes and however rows are packed."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import full
from tiny import config, options, put, run, trainer

from gptjax import config as configs
from gptjax.checkpoint import Contents
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, SourceConfig, UserError
from gptjax.data import EvalRows, Mixture, Packed, Recipe, TrainRows, open_source, write_store
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.model import model_of
from gptjax.sharding import make_mesh
from gptjax.training import preference, train
from gptjax.training.preferences import LOSSES, Pairs
from gptjax.training.reference import _log_probabilities

def loss(name, chosen, rejected, *, likelihood=((0, 0),), divergence=0.0, **settings):
  """The mean loss of pairs with these values of r."""
  settings = ObjectiveConfig('preference', name, **settings)
  chosen, rejected = (settings.beta * np.atleast_2d(np.float32(r)) for r in (chosen, rejected))
  pairs = Pairs(chosen, rejected, jnp.float32(likelihood)[None], jnp.float32(divergence))
  return float(LOSSES[name](pairs, settings).mean())


@pytest.mark.parametrize('name, settings, value', [
  ('dpo', {}, 0.693147), ('dpo', {'smoothing': 0.3}, 0.693147), ('robust', {'smoothing': 0.3}, 0.693147), ('hinge', {}, 1.0),
  ('ipo', {}, 25.0), ('dpo_norm', {'beta': 5.0}, 0.693147), ('apo_zero', {}, 1.0), ('apo_down', {}, 1.0), ('kto', {}, 0.5),
  ('simpo', {}, 0.974077)])
def test_values_where_the_model_is_its_reference(name, settings, value):
  assert loss(name, 0, 0, **settings) == pytest.approx(value, abs=1e-6)


def test_values_of_other_libraries():
  np.random.seed(0)
  policy, reference = (np.random.normal(0, 5, (8, 4)).sum(-1) for _ in range(2))
  ratio = policy - reference
  assert loss('dpo', ratio[:4], ratio[4:]) == pytest.approx(0.7530594, abs=1e-6)
  assert loss('dpo', ratio[:4], ratio[4:], smoothing=0.3) == pytest.approx(0.9254465, abs=1e-6)
  np.random.seed(0)
  logs, mask = -np.abs(np.random.uniform(size=(8, 4))), np.arange(4) < np.array([2, 3, 4, 1] * 2)[:, None]
  m = (logs * mask).sum(-1) / mask.sum(-1)
  total = loss('orpo', 0, 0, likelihood=np.stack([m[:4], m[4:]], -1))
  assert total + m[:4].mean() == pytest.approx(0.671129 - 0.592339, abs=1e-6)  # without the likelihood, which is of other tokens there
  assert loss('orpo', 0, 0, likelihood=[[-0.7, -0.7]]) == pytest.approx(0.7 + 0.069315, abs=1e-6)


def test_formulas():
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  found = {name: loss(name, 3, -2, beta=0.5) for name in ('dpo', 'hinge', 'ipo', 'apo_zero', 'apo_down', 'simpo')}
  gap = 2.5
  assert found == pytest.approx({'dpo': -np.log(sigmoid(gap)), 'hinge': 0, 'ipo': 16, 'apo_zero': 1 - sigmoid(1.5) + sigmoid(-1),
                                 'apo_down': sigmoid(1.5) + 1 - sigmoid(gap), 'simpo': -np.log(sigmoid(gap - 0.5))}, rel=1e-5)
  assert loss('robust', 3, -2, beta=0.5, smoothing=0.1) == pytest.approx(
    (-0.9 * np.log(sigmoid(gap)) + 0.1 * np.log(sigmoid(-gap))) / 0.8, rel=1e-5)
  assert loss('kto', 3, -2, beta=0.5, divergence=2.0) == pytest.approx((1 - sigmoid(1.5 - 1) + 1 - sigmoid(1 + 1)) / 2, rel=1e-5)


MODEL = ModelConfig(layers=1, width=16, heads=2, vocab_size=259, positions='rope')


@pytest.fixture(scope='module', params=[False, True], ids=['pairs', 'mismatched'])
def store(request, tmp_path_factory):
  """Pairs of unequal lengths."""
  folder = tmp_path_factory.mktemp('pairs')
  lines = [{'q': f'{i} ' * (i % 3), 'w': f'{i}!' * (1 + i % 2), 'l': f'{i}?'} for i in range(48)]
  (folder / 'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  source = open_source(SourceConfig(str(folder / 'a.jsonl'), prompt='q', chosen='w', rejected='l', mismatched=request.param))
  return write_store(folder / 'store', Recipe(source, ByteTokenizer()))


def with_reference(batch):
  """A batch with log-probabilities that are the same for the same tokens wherever they stand."""
  part = batch['targets'] * 0.3 + batch['tokens'] * 0.7
  return batch | {'reference': np.where(batch['mask'] > 0, -7 - np.sin(part), 0).astype(np.float32)}


ONE = 'document', 4, {'data': 1}, 0
OTHERS = [('pack', 1, {'data': 1}, 0), ('pack', 2, {'data': 2, 'model': 2, 'context': 2}, 3), ('pack', 2, {'data': 2, 'pipe': 2}, 1)]


@pytest.mark.parametrize('name, layouts', [
  ('dpo', OTHERS[1:2]), *(full(name, OTHERS) for name in ('dpo', 'ipo', 'simpo', 'kto', 'orpo'))])
def test_the_step_depends_neither_on_packing_nor_microbatches_nor_the_mesh(name, layouts, store, tmp_path):
  if (name == 'kto') != (store.parts == 3):
    pytest.skip('kto needs mismatched parts')
  objective = preference(ObjectiveConfig('preference', name, chosen_weight=0.2))
  model, found = dataclasses.replace(MODEL, layers=max(sizes.get('pipe', 1) for *_, sizes, _ in layouts)), {}
  for kind, microbatches, sizes, stage in (ONE, *layouts):
    microbatches = 1 if name == 'kto' else microbatches
    rows = EvalRows(store, 64, True, tmp_path) if kind == 'pack' else TrainRows(
      [layout := Packed(store, 64, kind, tmp_path)], Mixture([layout.count], [1.0]), 64, 0, True)
    count = 48 if kind == 'document' else -(-rows.count // 8) * 8  # the rest is padding
    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
      state, step = trainer(model, context=64, zero_stage=stage, microbatches=microbatches, objective=objective)
      _, metrics = step(state, put(with_reference(rows.batch(np.arange(count)))))
    found[kind, microbatches, str(sizes)] = {name: float(value) for name, value in metrics.items()}
  one, *others = found.values()
  assert one['targets'] == sum(len(f'{i}!' * (1 + i % 2)) + len(f'{i}?') + 2 for i in range(48))
  assert 0 < one['accuracy'] < 1 and one['length_chosen'] > one['length_rejected']
  for other in others:
    assert other == pytest.approx(one, rel=1e-5, abs=2e-6)
  if name == 'kto':
    assert one['divergence'] > 0


def test_the_gradient_at_the_start_is_that_of_the_difference_of_likelihoods(store, tmp_path):
  if store.parts == 3:
    pytest.skip('of pairs')
  rows, mesh = EvalRows(store, 64, True, tmp_path).batch(np.arange(4)), make_mesh(MeshConfig(data=1))
  with jax.set_mesh(mesh):
    state, step = trainer(MODEL, optax.sgd(1.0), context=64, objective=preference(ObjectiveConfig('preference')))
    start = jax.device_get(state)
    described = model_of(Config(model=MODEL, data=DataConfig(context=64)))
    reference = np.asarray(_log_probabilities(described, mesh, 0)(state.trained, put(rows)))
    at = lambda parameters: step(jax.device_put(start._replace(trained=parameters)), put(rows | {'reference': reference}))
    stepped, metrics = at(start.trained)
    gradient = {name: value - np.asarray(stepped.trained[name]) for name, value in start.trained.items()}
    rng = np.random.default_rng(0)
    direction = {name: rng.standard_normal(value.shape, np.float32) for name, value in start.trained.items()}
    ahead, behind = ({name: float(value) for name, value in at(
      {name: value + sign * 2e-4 * direction[name] for name, value in start.trained.items()})[1].items()} for sign in (1, -1))
  assert metrics['loss'] == pytest.approx(np.log(2), abs=1e-6) and abs(metrics['margin']) < 1e-6 and metrics['accuracy'] == 0.5
  slope = sum(float((gradient[name] * direction[name]).sum()) for name in gradient)
  assert slope == pytest.approx((ahead['loss'] - behind['loss']) / 4e-4, rel=0.01) and abs(slope) > 0.01
  assert slope == pytest.approx(-(ahead['margin'] - behind['margin']) / 2 / 4e-4, rel=0.01)


@pytest.fixture(scope='module')
def tuned(cache):
  """The config and workdir of a run on right answers, and the file of pairs."""
  lines = [{'q': f'{i % 7}+{i % 5}=', 'w': f'{i % 7 + i % 5}.', 'l': f'{i % 7 + i % 5 + 1 + i % 3}.'} for i in range(60)]
  (cache / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  settings = config(cache / 'pairs.jsonl', objective__kind='sft', data__source__prompt='q', data__source__completion='w', data__rows='pack',
                    data__tokenizer__kind='bytes', steps=6, eval__every=0, data__context=32)
  run(settings, cache / 'tuned', cache)
  return settings, cache / 'tuned'


def pairs(tuned, **changes):
  settings, workdir = tuned
  return configs.override(settings, {
    'data.source.completion': '', 'data.source.chosen': 'w', 'data.source.rejected': 'l', 'objective.kind': 'preference', 'steps': 6,
    'init_from': str(workdir), 'data.tokenizer.path': str(workdir / 'data' / 'tokenizer'), 'checkpoint.every': 3, 'eval.every': 3,
    **{name.replace('__', '.'): value for name, value in changes.items()}})


@pytest.mark.parametrize('rank', [0, full(2)])
def test_a_run_begins_at_its_reference_learns_and_goes_on_bit_by_bit(rank, tuned, cache, tmp_path):
  shutil.copytree(tuned[1], tmp_path / 'source')
  settings = pairs(tuned, init_from=str(tmp_path / 'source'), lora__rank=rank)
  found = run(settings, tmp_path / 'run', cache)
  assert found[0]['loss'] == pytest.approx(np.log(2), abs=1e-6) and found[0]['kl'] == pytest.approx(0, abs=1e-6)
  training, scores = [line for line in found if 'loss' in line], [line for line in found if 'eval/valid/margin' in line]
  assert training[-1]['margin'] > 0.01 and training[-1]['loss'] < training[0]['loss'] - 0.005
  assert {'eval/valid/accuracy', 'eval/valid/reward_chosen', 'eval/valid/loss'} <= {*scores[0]} and 'eval/valid/perplexity' not in scores[0]
  run(settings, tmp_path / 'again', cache, stop_at=3)
  shutil.rmtree(tmp_path / 'source')  # and the columns, which are made again from the reference in the workdir
  shutil.rmtree(tmp_path / 'again' / 'log_probabilities')
  assert run(settings, tmp_path / 'again', cache) == found
  one, other = (Contents(tmp_path / name / 'checkpoints' / '6') for name in ('run', 'again'))
  for (name, a), (_, b) in zip(one.read([*one.shapes]), other.read([*other.shapes]), strict=True):
    assert np.array_equal(a, b), name
  # A run that ended before its first checkpoint may start again from another model, which is then the reference.
  shutil.rmtree(tmp_path / 'again' / 'checkpoints')
  restarted = run(pairs(tuned, init_from=str(tmp_path / 'run'), lora__rank=rank), tmp_path / 'again', cache)
  assert restarted[0]['kl'] == pytest.approx(0, abs=1e-6) and restarted[0]['margin'] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('changes, words', [
  ({'init_from': ''}, "init_from: '', expected: the run to start from, which is the reference"),
  ({'objective__loss': 'kto'}, 'objective.kind: .*mismatched'),
  ({'data__source__mismatched': True}, 'objective.kind: .*objective.loss is dpo'),
  ({'objective__kind': 'sft'}, "objective.kind: 'sft', expected: preference for pairs"),
  ({'objective__kind': 'next_token'}, "objective.kind: 'next_token', expected: preference"),
  ({'objective__loss': 'dop'}, "objective.loss: 'dop', expected: .*did you mean dpo"),
  ({'objective__loss': 'ipo', 'objective__smoothing': 0.1}, 'objective.smoothing: 0.1, expected: its default'),
  ({'objective__smoothing': 0.5}, 'objective.smoothing: 0.5, expected: at least 0 and below 0.5'),
  ({'data__source__rejected': ''}, "data.source.rejected: '', expected"),
  ({'data__source__rejected': 'w'}, 'pairs.jsonl.*expected: two answers, which differ'),
  ({'data__source__completion': 'w'}, 'data.source.completion: .*none with data.source.chosen'),
  ({'data__long_examples': 'cut'}, "data.long_examples: 'cut', expected: drop for pairs"),
  ({'data__context': 8}, 'data.context: 8, expected: more')])
def test_mistakes(changes, words, tuned, cache, tmp_path):
  with pytest.raises(UserError, match=words):
    train(pairs(tuned, **changes), options(tmp_path / 'run', cache))
