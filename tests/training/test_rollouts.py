"""Policy gradients: advantages and weights have the values of their papers, the first step is REINFORCE, and runs resume bit by bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from tiers import full
from tiny import config, options, put, run, trainer

from gptjax import config as configs
from gptjax.checkpoint import Contents
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, ObjectiveConfig, Reward, UserError
from gptjax.data import prepare
from gptjax.model import model_of
from gptjax.sharding import make_mesh
from gptjax.training import make_rewards, next_token, policy_gradient, resolve, train
from gptjax.training.policy import advantages, token_weights
from gptjax.training.reference import _log_probabilities
from gptjax.training.rollouts import Rollouts, prompts_of
from gptjax.training.workdir import initial_state

MODEL = ModelConfig(layers=1, width=16, heads=2, vocab_size=24, positions='rope')


def test_weights_of_tokens():
  losses, mask = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]), np.array([[1.0, 1, 0], [1, 1, 1]])
  mean = lambda loss: (losses * token_weights(mask, loss, 3)).sum() / len(losses)
  found = {loss: mean(loss) for loss in ('dapo', 'grpo', 'dr_grpo', 'rloo', 'gspo')}
  assert found == pytest.approx({'dapo': 0.36, 'grpo': 0.325, 'dr_grpo': 0.3, 'rloo': 0.9, 'gspo': 0.325}, abs=1e-6)


def test_advantages():
  rewards = np.array([[1.0, 2, 3], [4, 5, 6]])
  np.testing.assert_allclose(advantages(rewards, 'rloo'), [[-1.5, 0, 1.5]] * 2)
  np.testing.assert_allclose(advantages(rewards, 'dr_grpo'), [[-1, 0, 1]] * 2)
  np.testing.assert_allclose(advantages(rewards, 'grpo'), [[-1 / 1.0001, 0, 1 / 1.0001]] * 2)
  for loss in ('grpo', 'dr_grpo', 'rloo', 'dapo', 'gspo'):
    assert not advantages(np.ones((2, 4)), loss).any()
    unknown = advantages(np.array([[1.0, np.nan, 3, 5]]), loss)
    assert unknown[0, 1] == 0 and unknown[0, [0, 2, 3]] == pytest.approx(advantages(np.array([[1.0, 3, 5]]), loss)[0])


def completions(count=16, context=12, seed=0):
  """Rows of random completions, with random log-probabilities near those of a fresh model."""
  rng = np.random.default_rng(seed)
  starts, ends = rng.integers(1, 4, count)[:, None], rng.integers(5, context + 1, count)[:, None]
  places = np.arange(context)
  mask = ((places >= starts) & (places < ends)).astype(np.float32)
  return {
    'tokens': rng.integers(3, 24, (count, context), np.int32), 'targets': rng.integers(3, 24, (count, context), np.int32), 'mask': mask,
    'segments': (places < ends).astype(np.int32), 'positions': np.broadcast_to(places.astype(np.int32), mask.shape).copy(),
    'old': mask * rng.normal(-3.2, 0.3, mask.shape).astype(np.float32), 'first': (places == starts).astype(np.float32),
    'advantage': mask * rng.normal(size=(count, 1)).astype(np.float32),
    'reference': mask * rng.normal(-3.2, 0.3, mask.shape).astype(np.float32),
    'metric/reward': (places == starts) * rng.normal(size=(count, 1)).astype(np.float32)}


LAYOUTS = [(2, {'data': 2, 'pipe': 2, 'context': 2}, 1), (4, {'data': 1}, 0), (2, {'data': 2, 'model': 2, 'context': 2}, 3)]
"""Microbatches, mesh and stage of ZeRO."""


@pytest.mark.parametrize('loss, layouts', [
  ('grpo', LAYOUTS[:1]), *(full(loss, LAYOUTS) for loss in ('grpo', 'dr_grpo', 'dapo', 'gspo', 'rloo'))])
def test_the_step_depends_neither_on_microbatches_nor_the_mesh(loss, layouts):
  settings = ObjectiveConfig('grpo', loss, rewards=(Reward('exact'),), kl=0.1, clip=0.1)
  rows = completions()
  rows['weight'] = token_weights(rows['mask'], loss, 12)
  found = []
  for microbatches, sizes, stage in ((1, {'data': 1}, 0), *layouts):
    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
      state, step = trainer(dataclasses.replace(MODEL, layers=2), context=12, zero_stage=stage, microbatches=microbatches,
                            objective=policy_gradient(settings))
      found.append({name: float(value) for name, value in step(state, put(rows))[1].items()})
  for other in found[1:]:
    assert other == pytest.approx(found[0], rel=1e-5, abs=1e-6)
  assert found[0]['targets'] == rows['mask'].sum() and found[0]['reward'] == pytest.approx(rows['metric/reward'].sum() / 16, rel=1e-5)
  assert found[0]['kl'] > 0 and (found[0]['clip_share'] > 0) == (loss != 'rloo')


@pytest.mark.parametrize('loss', ['grpo', full('dr_grpo'), full('dapo'), full('gspo'), full('rloo')])
def test_the_first_step_is_that_of_reinforce(loss):
  rows, advantage = completions(), completions()['advantage']
  rows['weight'] = token_weights(rows['mask'], loss, 12)
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    objective = policy_gradient(ObjectiveConfig('grpo', loss, rewards=(Reward('exact'),)))
    state, step = trainer(MODEL, optax.sgd(1.0), context=12, objective=objective)
    start = jax.device_get(state)
    again = lambda: jax.device_put(start)
    _, reinforce = trainer(MODEL, optax.sgd(1.0), context=12, objective=next_token())
    logs = _log_probabilities(model_of(Config(model=MODEL, data=DataConfig(context=12))), jax.sharding.get_mesh(), 0)
    rows['old'] = np.asarray(logs(start.trained, put(rows)))
    stepped, metrics = step(again(), put(rows))
    # REINFORCE: cross-entropy with the advantages for weights, divided by their sum instead of by the completions.
    weights = rows['weight'] * advantage
    other, _ = reinforce(again(), put(rows | {'mask': weights}))
    still, equal = step(again(), put(rows | {'advantage': 0 * advantage}))
  assert metrics['ratio'] == pytest.approx(1, abs=1e-6) and metrics['clip_share'] == 0
  assert metrics['loss'] == pytest.approx(-weights.sum() / 16, abs=1e-6) and equal['grad_norm'] == 0
  for name, value in start.trained.items():
    np.testing.assert_array_equal(still.trained[name], value)
    ours, theirs = value - np.asarray(stepped.trained[name]), (value - np.asarray(other.trained[name])) * weights.sum() / 16
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-6 * np.abs(ours).max() + 1e-7, err_msg=name)


@pytest.fixture(scope='module')
def source(cache):
  """The config and workdir of a run on digits."""
  lines = [{'q': f'{i % 10}{i // 10 % 10}=', 'a': f'{(i + i // 10) % 10}'} for i in range(100)]
  (cache / 'digits.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  settings = config(cache / 'digits.jsonl', objective__kind='sft', data__source__prompt='q', data__source__completion='a',
                    data__rows='document', steps=20, eval__every=0, data__context=8, batch_size=16)
  run(settings, cache / 'source', cache)
  return settings, cache / 'source'


def drawn(source, **changes):
  settings, workdir = source
  return configs.override(settings, {
    'objective.kind': 'grpo', 'objective.rewards': (Reward('exact'),), 'objective.group': 4, 'objective.max_tokens': 3, 'steps': 5,
    'init_from': str(workdir), 'data.tokenizer.path': str(workdir / 'data' / 'tokenizer'), 'checkpoint.every': 3, 'eval.completions': 2,
    'eval.every': 3, **{name.replace('__', '.'): value for name, value in changes.items()}})


@pytest.mark.parametrize('changes', [{}, full({'objective__rollout_steps': 2, 'objective__kl': 0.1}),
                                     full({'lora__rank': 2, 'objective__loss': 'gspo', 'objective__kl': 0.1})])
def test_a_run_begins_on_policy_and_goes_on_bit_by_bit(changes, source, cache, tmp_path):
  settings = drawn(source, **changes)
  found = run(settings, tmp_path / 'run', cache)
  steps, scores = [line for line in found if 'loss' in line], [line for line in found if 'eval/valid/pass@1' in line]
  assert steps[0]['ratio'] == pytest.approx(1, abs=1e-5) and steps[0]['clip_share'] == 0
  if 'objective__kl' in changes:
    assert steps[0]['kl'] == pytest.approx(0, abs=1e-6) and steps[-1]['kl'] > 0
  if 'objective__rollout_steps' in changes:
    assert abs(steps[1]['ratio'] - 1) > 1e-6
  assert all(0 <= line['reward'] == line['reward_exact'] <= 1 and 1 <= line['length'] <= 3 for line in steps)
  assert {'eval/valid/pass@2', 'eval/valid/greedy', 'eval/valid/reward'} <= {*scores[0]}
  run(settings, tmp_path / 'again', cache, stop_at=3)
  assert run(settings, tmp_path / 'again', cache) == found
  one, other = (Contents(tmp_path / name / 'checkpoints' / '5') for name in ('run', 'again'))
  for (name, a), (_, b) in zip(one.read([*one.shapes]), other.read([*other.shapes]), strict=True):
    assert np.array_equal(a, b), name
  # A kill may lose the newest checkpoint, and with it later rollouts.
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '5')
  assert run(settings, tmp_path / 'run', cache) == found
  if 'objective__rollout_steps' not in changes:
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '5')
    larger = run(configs.override(settings, {'batch_size': 32, 'microbatches': 2}), tmp_path / 'run', cache)  # as many are drawn at once
    assert [line['step'] for line in larger] == [line['step'] for line in found] and larger != found


@pytest.mark.full
def test_a_step_whose_completions_are_all_left_out_changes_nothing():
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    objective = policy_gradient(ObjectiveConfig('grpo', rewards=(Reward('exact'),), count_truncated=False))
    state, step = trainer(MODEL, context=12, objective=objective)
    before = jax.device_get(state)
    rows = completions()
    after, metrics = step(state, put(rows | {'mask': 0 * rows['mask'], 'weight': 0 * rows['mask'], 'advantage': 0 * rows['mask']}))
  assert not metrics['bad'] and all(np.array_equal(before.trained[name], value) for name, value in after.trained.items())
  assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before.optimizer), jax.tree.leaves(after.optimizer), strict=True))


def test_completions_are_those_of_their_prompts_and_rewards_those_of_their_texts(source, cache, tmp_path):
  settings = drawn(source)
  mesh = make_mesh(settings.mesh)
  with jax.set_mesh(mesh):
    data = prepare(settings.data, cache)
    new = resolve(settings, data, mesh)
    state = initial_state(new, data.tokenizer)[0]
    batches = Rollouts(new, data, tmp_path, make_rewards(settings.objective.rewards, None), lambda rows: None, True)(0, lambda: state)
    batch = next(batches)
    second = next(batches)
    again = next(Rollouts(new, data, tmp_path, make_rewards(settings.objective.rewards, None), lambda rows: None, True)(16, lambda: state))
    np.testing.assert_array_equal(again['tokens'], second['tokens'])
  assert not np.array_equal(batch['tokens'], second['tokens'])
  prompts = [*prompts_of(new.rows.batch(np.arange(4)), data.tokenizer)]
  assert all(prompt.row['prompt'][0] + prompt.row['prompt'][1] != '' and len(prompt.row['answer']) == 1 for prompt in prompts)
  for row in range(16):
    prompt, mask = prompts[row // 4], batch['mask'][row] > 0
    start = len(prompt.ids) - 1
    assert batch['tokens'][row, :start + 1].tolist() == prompt.ids and np.flatnonzero(mask)[0] == start and batch['first'][row, start] == 1
    ids = batch['targets'][row, mask].tolist()
    text = data.tokenizer.decode([one for one in ids if one not in data.tokenizer.stop_ids])
    assert batch['metric/reward'][row].sum() == (text.strip() == prompt.row['answer'])
    assert batch['metric/truncated'][row].sum() == (ids[-1] not in data.tokenizer.stop_ids) and len(ids) <= 3
    assert (batch['tokens'][row, start + 1:start + len(ids)] == ids[:-1]).all()
  spread = batch['metric/reward'].sum(-1).reshape(4, 4).std(-1, ddof=1)
  np.testing.assert_allclose(batch['metric/reward_std'].sum(-1), np.repeat(spread, 4), rtol=1e-5)


@pytest.mark.parametrize('changes, words', [
  ({'objective__rewards': ()}, 'objective.rewards: .*one or more'),
  ({'objective__rewards': (Reward('exakt'),)}, "name: 'exakt', .*did you mean exact"),
  ({'objective__group': 3}, 'batch_size: 16, expected: a multiple of objective.group=3'),
  ({'objective__max_tokens': 6}, 'data.context: 8, expected: 9 or more, for a prompt of 4 tokens and completions of 6'),
  ({'objective__max_tokens': 8}, 'objective.max_tokens: 8, expected: below data.context=8'),
  ({'objective__loss': 'dpo'}, "objective.loss: 'dpo', expected: grpo, dr_grpo"),
  ({'data__rows': 'pack'}, "data.rows: 'pack', expected: document"),
  ({'objective__kl': 0.1, 'init_from': ''}, "init_from: '', expected: the run to start from"),
  ({'data__source__supervised': 'all'}, "data.source.supervised: 'all', expected: answers with objective.kind=grpo"),
  ({'z_loss': 0.1}, 'z_loss: 0.1, expected: 0 with objective.kind=grpo'),
  ({'objective__beta': 0.2}, 'objective.beta: 0.2, expected: its default unless objective.kind is preference')])
def test_mistakes(changes, words, source, cache, tmp_path):
  with pytest.raises(UserError, match=words):
    train(drawn(source, **changes), options(tmp_path / 'run', cache))
  assert not (tmp_path / 'run').exists() or 'max_tokens' in str(changes)
