"""Bad steps are found inside the compiled step and change nothing; each policy works; replicas that differ are found."""

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import full
from tiny import batch, config, options, put, records, run, small_disk, trainer, write_text

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints, Progress
from gptjax.config import Config, Fault, FaultsConfig, ModelConfig, UserError
from gptjax.data import prepare, train_rows
from gptjax.training import loop, train
from gptjax.training import batches as feeding
from gptjax.training.guard import WARMUP, BadSteps, Rollback, initial_statistics, is_good_step, replica_check
from gptjax.training.run import Run

MODEL = ModelConfig(layers=1, width=16, heads=2, vocab_size=50)


@pytest.fixture(scope='module')
def settings(cache):
  return config(write_text(cache / 'text.txt'), steps=10, eval__every=0, checkpoint__every=3, checkpoint__keep=5)


@pytest.fixture(scope='module')
def straight(settings, cache):
  """The records of an undisturbed run."""
  return run(settings, cache / 'straight', cache)


@pytest.mark.parametrize('mesh, zero_stage, microbatches', [
  ('1x1', 0, 1), full('4x2', 0, 2), ('4x2', 3, 1)], indirect=['mesh'])
@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_an_update_that_is_not_finite_is_not_applied(mesh, zero_stage, microbatches, where):
  state, step = trainer(MODEL, zero_stage=zero_stage, microbatches=microbatches)
  good = put(batch())
  state, metrics = step(state, good)
  assert not metrics['bad']
  before = jax.device_get(state)
  rows = batch()
  if where == 'loss':
    rows['mask'][3, 3] = np.nan
    state, metrics = step(state, put(rows))
    assert math.isnan(metrics['loss'])
  else:  # one value of one parameter, and so all gradients, while the good batch itself would do
    name = 'blocks/0/attention_norm/gain'
    gain = before.parameters[name].copy()
    gain[0] = np.inf
    before = before._replace(trained=before.trained | {name: gain})
    placed = jax.device_put(gain, state.parameters[name].sharding)
    state, metrics = step(state._replace(trained=state.trained | {name: placed}), good)
  assert metrics['bad']
  after = jax.device_get(state)
  assert after.step == before.step + 1
  for one, other in zip(jax.tree.leaves(after[1:]), jax.tree.leaves(before[1:]), strict=True):
    assert one.tobytes() == other.tobytes()
  if where == 'loss':  # and training continues
    state, metrics = step(state, good)
    assert not metrics['bad'] and np.isfinite(metrics['loss'])


def test_a_spike_is_distinguished_from_usual_values():
  rng = np.random.default_rng(0)
  values = rng.normal(3.0, 0.1, (400, 2)).astype(np.float32)
  statistics, check = initial_statistics(), jax.jit(is_good_step, static_argnums=3)
  early = jnp.float32(4.0)
  good, _ = check(statistics, early, early, 6.0)
  assert good  # nothing is known yet
  for loss, norm in values:
    good, statistics = check(statistics, loss, norm, 6.0)
    assert good
  np.testing.assert_allclose(statistics.mean, 3.0, atol=0.05)
  np.testing.assert_allclose(np.sqrt(statistics.variance), 0.1, atol=0.03)
  mean, deviation = np.asarray(statistics.mean), np.sqrt(statistics.variance)
  for away, expected in ((5.9, True), (6.1, False), (-50.0, True), (np.nan, False), (np.inf, False)):
    for index in (0, 1):
      pair = mean.copy()
      pair[index] += away * deviation[index]
      good, after = check(statistics, *pair, 6.0)
      assert good == expected, (away, index)
      assert expected or all((a == b).all() for a, b in zip(after, statistics))
  good, _ = check(statistics, *(mean + 1000 * deviation), 0.0)
  assert good  # spikes are not looked for
  assert int(statistics.steps) == 400 > WARMUP


@pytest.fixture
def spoil(settings, cache, monkeypatch):
  """A function (step, value=NaN): replaces the ones in the mask of a step of the undisturbed run; of all steps if it is None."""
  rows, place = train_rows(settings, prepare(settings.data, cache)), feeding.put_rows

  def spoil(step, value=np.nan):
    bad = rows.batch(4 * ((step or 1) - 1) + np.arange(4))['tokens']

    def spoiled(mesh, batch, size):
      if step is None or (batch['tokens'] == bad).all():
        batch = batch | {'mask': np.where(batch['mask'] > 0, value, batch['mask']).astype(np.float32)}
      return place(mesh, batch, size)

    monkeypatch.setattr(feeding, 'put_rows', spoiled)

  return spoil


def bad_steps(workdir):
  return [json.loads(line) for line in (workdir / 'bad_steps.jsonl').read_text().splitlines()]


def test_stop_ends_the_run_and_names_the_batch(settings, straight, cache, tmp_path, spoil):
  spoil(8)
  with pytest.raises(UserError, match=r'^loss: nan, expected: .*step 8 is bad.*rows 28 to 31; its update was not applied$'):
    train(settings, options(tmp_path / 'run', cache))
  assert bad_steps(tmp_path / 'run') == [{'step': 8, 'rows': [28, 32], 'loss': None, 'grad_norm': None, 'action': 'stop'}]
  assert records(tmp_path / 'run') == [line for line in straight if line['step'] < 8]
  assert Checkpoints(tmp_path / 'run' / 'checkpoints').steps() == [3, 6]


def test_skip_discards_the_update_and_continues(settings, cache, tmp_path, spoil, capsys):
  settings = configs.override(settings, {'faults.bad_step': 'skip'})
  spoil(8)
  lines = run(settings, tmp_path / 'run', cache)
  assert [line['step'] for line in lines] == [*range(1, 11), 10]
  assert lines[7]['loss'] is None and all(line['loss'] for line in (*lines[:7], *lines[8:10]))
  assert [bad['step'] for bad in bad_steps(tmp_path / 'run')] == [8]
  assert 'step 8 is bad' in capsys.readouterr().err
  (tmp_path / 'other').mkdir()
  again = run(settings, tmp_path / 'other', cache, stop_at=9)  # a run that is stopped and resumed does the same
  assert run(settings, tmp_path / 'other', cache) == lines and again == [line for line in lines if line['step'] <= 9]
  assert [bad['step'] for bad in bad_steps(tmp_path / 'other')] == [8]


def test_a_batch_without_targets_is_passed_over_and_reported(settings, cache, tmp_path, spoil, capsys):
  spoil(8, 0)
  lines = run(settings, tmp_path / 'run', cache)
  assert [line['step'] for line in lines] == [*range(1, 8), 9, 10, 10]  # step 8 has no loss
  assert lines[7]['tokens'] - lines[6]['tokens'] == lines[6]['tokens'] - lines[5]['tokens'] == 64
  assert 'step 8: rows 28 to 31 have no targets: no update; 1 such steps so far' in capsys.readouterr().err
  assert not (tmp_path / 'run' / 'bad_steps.jsonl').exists()


def test_a_run_that_never_finds_a_target_is_an_error(settings, cache, tmp_path, spoil):
  spoil(None, 0)
  with pytest.raises(UserError, match=r"^data: '10 batches without targets', expected: rows with targets"):
    train(settings, options(tmp_path / 'run', cache))


def test_rollback_restores_a_checkpoint_and_skips_the_batch(settings, straight, cache, tmp_path, spoil, capsys):
  spoil(8)
  settings = configs.override(settings, {'faults.bad_step': 'rollback'})
  lines = run(settings, tmp_path / 'run', cache)
  printed = capsys.readouterr().err
  assert 'back to step 6' in printed and 'step 8: rows 28 to 31 are skipped' in printed
  assert lines[:7] == straight[:7]  # steps 7 again, bit by bit
  assert [line['step'] for line in lines] == [*range(1, 11), 10]
  assert lines[7]['loss'] != straight[7]['loss'] and all(line['loss'] for line in lines[:10])
  checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints')
  assert checkpoints.progress(10).rows == 44  # ten batches, and the one that is skipped
  # One that is killed after that knows it from its folder.
  again = run(settings, tmp_path / 'other', cache, stop_at=9)
  assert run(settings, tmp_path / 'other', cache) == lines and len(again) == 9


def test_a_rollback_before_the_first_checkpoint_restarts_the_run(settings, cache, tmp_path, spoil):
  spoil(2)
  lines = run(configs.override(settings, {'faults.bad_step': 'rollback'}), tmp_path / 'run', cache)
  assert [line['step'] for line in lines] == [*range(1, 11), 10] and all(line['loss'] for line in lines[:10])


def test_skipped_rows_are_skipped_with_any_batch_size(tmp_path):
  bad = BadSteps(FaultsConfig(bad_step='rollback'), tmp_path, writes=True)
  for step, rows in ((8, (28, 32)), (9, (32, 36)), (20, (76, 80))):
    with pytest.raises(Rollback):
      bad.add(step, rows, math.nan, 1.0)
  again = BadSteps(FaultsConfig(), tmp_path, writes=True)
  assert [again.next_row(row, 4) for row in (20, 24, 28, 32, 36, 72, 76)] == [20, 24, 36, 36, 36, 72, 80]
  assert [again.next_row(row, 8) for row in (16, 24, 64, 72)] == [16, 36, 64, 80]
  assert [again.excluded_after(row) for row in (0, 30, 36, 76, 80)] == [12, 10, 4, 4, 0]


def test_the_rows_of_a_step_are_those_that_the_run_reads(tmp_path):
  size, bad = 4, {2: (4, 8), 5: (20, 24), 6: (24, 28)}  # the second and the fifth were rolled back
  (tmp_path / 'bad_steps.jsonl').write_text(''.join(json.dumps({
    'step': step, 'rows': rows, 'loss': None, 'grad_norm': 1.0, 'action': 'skip' if step == 6 else 'rollback'}) + '\n'
    for step, rows in bad.items()))
  steps, row, taken = BadSteps(FaultsConfig(), tmp_path, writes=True), 0, {}
  for step in range(1, 9):  # as the loop of a run
    first = steps.next_row(row, size)
    taken[step], row = (first, first + size), first + size
  assert {step: steps.rows_of(step, size) for step in taken} == taken | bad
  assert taken[1] == (0, 4) and taken[8] == (36, 40)


def test_skipped_rows_reduce_the_available_rows(tmp_path):
  bad = BadSteps(FaultsConfig(bad_step='rollback'), tmp_path, writes=True)

  def of_rows(rows):
    run = mock.Mock(spec=Run)
    run.rows, run.config = SimpleNamespace(mixture=SimpleNamespace(rows=rows)), Config(batch_size=4)
    return run

  loop._check_rows(of_rows(40), Progress(6, 24), 10, bad)
  with pytest.raises(Rollback):
    bad.add(8, (28, 32), math.nan, 1.0)
  loop._check_rows(of_rows(44), Progress(6, 24), 10, bad)
  loop._check_rows(of_rows(None), Progress(6, 24), 10, bad)
  with pytest.raises(UserError, match=r'^steps: 10, expected: at most 9, or --stop_at=9: .* 40 rows .*, of which 28 are used'):
    loop._check_rows(of_rows(40), Progress(6, 24), 10, bad)


def test_an_incomplete_line_after_a_kill_is_removed(tmp_path):
  bad = BadSteps(FaultsConfig(bad_step='skip'), tmp_path, writes=True)
  bad.add(8, (28, 32), math.nan, 1.0)
  with (tmp_path / 'bad_steps.jsonl').open('a') as file:
    file.write('{"step": 9, "ro')
  for _ in range(2):
    bad = BadSteps(FaultsConfig(bad_step='skip'), tmp_path, writes=True)
    assert [one.step for one in bad.found] == [8]
    bad.resume_from(8)
    bad.add(9, (32, 36), math.nan, 1.0)
    assert [line['step'] for line in bad_steps(tmp_path)] == [8, 9]
    BadSteps(FaultsConfig(), tmp_path, writes=True).resume_from(8)


def test_bad_steps_in_a_row_end_a_run_that_skips(tmp_path):
  bad = BadSteps(FaultsConfig(bad_step='skip'), tmp_path, writes=True)
  for step in [*range(1, 99), *range(100, 199)]:
    bad.add(step, (step, step + 1), math.nan, 1.0)
  with pytest.raises(Fault, match='step 199 is bad.*last of 100 consecutive bad steps'):
    bad.add(199, (199, 200), math.nan, 1.0)
  again = BadSteps(FaultsConfig(bad_step='skip'), tmp_path, writes=True)  # started again from a checkpoint among them
  again.resume_from(197)
  again.add(198, (198, 199), math.nan, 1.0)
  with pytest.raises(Fault, match='step 199 is bad.*last of 100 consecutive bad steps'):
    again.add(199, (199, 200), math.nan, 1.0)


def test_repeated_steps_do_not_count_as_consecutive_bad_steps(tmp_path):
  bad = BadSteps(FaultsConfig(bad_step='rollback'), tmp_path, writes=True)
  for step in range(1, 100):
    with pytest.raises(Rollback):
      bad.add(step, (step, step + 1), math.nan, 1.0)
  again = BadSteps(FaultsConfig(bad_step='skip'), tmp_path, writes=True)
  again.resume_from(99)
  again.add(100, (400, 401), math.nan, 1.0)


def test_bad_steps_that_wait_in_memory_are_forgotten_too(tmp_path):
  folder = tmp_path / 'run'
  bad = BadSteps(FaultsConfig(bad_step='skip'), folder, writes=True)
  for step in (1, 5):
    bad.add(step, (step, step + 1), math.nan, 1.0)
  bad.resume_from(2)
  folder.mkdir()
  bad.flush()
  assert [line['step'] for line in bad_steps(folder)] == [1]


def test_bad_steps_wait_in_memory_for_a_full_disk(tmp_path):
  with small_disk(tmp_path / 'disk', '64k') as disk:
    bad = BadSteps(FaultsConfig(bad_step='skip'), disk, writes=True)
    filler = disk / 'filler'
    with contextlib.suppress(OSError):
      filler.write_bytes(bytes(2**20))
    bad.add(3, (8, 12), math.nan, 1.0)
    with pytest.raises(UserError, match='bad_steps.jsonl.*expected: a disk with space left'):
      bad.flush()
    filler.unlink()
    bad.flush()
    assert [line['step'] for line in bad_steps(disk)] == [3]


def test_a_damaged_line_of_bad_steps_is_an_error(tmp_path):
  (tmp_path / 'bad_steps.jsonl').write_text('{"step": 3, "rows": [1], "loss": 1.0, "grad_norm": 1.0, "action": "skip"}\n')
  with pytest.raises(UserError, match=r'bad_steps.jsonl:1: '):
    BadSteps(FaultsConfig(), tmp_path, writes=True)


@pytest.mark.parametrize('mesh, zero_stage', [('8x1', 0), full('4x2', 1)], indirect=['mesh'])
def test_a_replica_that_differs_is_found_with_its_device(mesh, zero_stage):
  state, _ = trainer(dataclasses.replace(MODEL, heads=4), zero_stage=zero_stage)
  check = replica_check(state, mesh)
  assert check(state) == ''
  name = 'blocks/0/mlp/up/kernel'
  parts = [np.array(shard.data) for shard in state.parameters[name].addressable_shards]
  devices = [shard.device for shard in state.parameters[name].addressable_shards]
  parts[5].view(np.uint32)[3, 1] ^= 1  # one bit
  array = state.parameters[name]
  changed = jax.make_array_from_single_device_arrays(array.shape, array.sharding, [
    jax.device_put(part, device) for part, device in zip(parts, devices)])
  assert check(state._replace(trained=state.trained | {name: changed})) == (
    f'replicas: trained/{name} on device {devices[5].id} of process 0 differ')


@pytest.mark.parametrize('action, zero_stage', [full('rollback', 3), ('skip', 3), full('rollback', 0)])
def test_a_device_with_a_wrong_state_is_found_within_the_interval(action, zero_stage, settings, cache, tmp_path, monkeypatch, capsys):
  settings = configs.override(settings, {'mesh.data': 4, 'faults.compare_every': 2, 'faults.bad_step': action, 'checkpoint.every': 4,
                                         'zero_stage': zero_stage, 'mesh.max_unsharded': 1.0})
  straight = run(settings, tmp_path / 'straight', cache)
  errs = [7]
  after = loop._Loop._after_step

  def err_once(self, last):
    if errs == [self.steps.step]:
      errs.clear()
      name, array = next(item for item in self.steps.state.trained.items() if item[0].endswith('up/kernel'))
      parts = [np.array(shard.data) for shard in array.addressable_shards]
      parts[2][:] = np.nan
      array = jax.make_array_from_single_device_arrays(array.shape, array.sharding, [
        jax.device_put(part, shard.device) for part, shard in zip(parts, array.addressable_shards)])
      self.steps.state = self.steps.state._replace(trained=self.steps.state.trained | {name: array})
    return after(self, last)

  monkeypatch.setattr(loop._Loop, '_after_step', err_once)
  if action == 'skip':
    with pytest.raises(Fault, match='^state: trained/blocks/0/mlp/up/kernel on device 2 of process 0 not finite at step 8'):
      train(settings, options(tmp_path / 'run', cache))
    assert Checkpoints(tmp_path / 'run' / 'checkpoints').steps() == [4]
    assert run(settings, tmp_path / 'run', cache) == straight
  else:
    assert run(settings, tmp_path / 'run', cache) == straight
    assert 'back to step 4' in capsys.readouterr().err
