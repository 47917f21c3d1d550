"""A run that was stopped or killed resumes as if it had not been; with the config of another run it does not resume."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from tiers import full
from tiny import config, options, records, run, write_text

from gptjax import config as configs
from gptjax.checkpoint import Contents, load_trained
from gptjax.checkpoint.manifest import read_manifest, write_manifest
from gptjax.config import UserError
from gptjax.data import train_rows, prepare
from gptjax.training import train

TESTS = pathlib.Path(__file__).parents[1]

SETTINGS = {
  'model__dropout': 0.2, 'model__width': 32, 'optimizer__name': 'muon', 'microbatches': 2, 'mesh__data': 2,
  'zero_stage': 3, 'eval__every': 2, 'eval__sample_tokens': 8, 'checkpoint__every': 3}


@pytest.fixture(scope='module')
def settings(cache):
  return config(write_text(cache / 'text.txt'), **SETTINGS)


@pytest.fixture(scope='module')
def straight(settings, cache):
  """The workdir of a run of 8 steps without a break."""
  run(settings, cache / 'straight', cache)
  return cache / 'straight'


@pytest.fixture(scope='module')
def halfway(settings, cache):
  """The workdir of the same run, stopped after step 4."""
  run(settings, cache / 'halfway', cache, stop_at=4)
  return cache / 'halfway'


@pytest.fixture
def stopped(halfway, tmp_path):
  """A copy of `halfway` for a test of its own."""
  return copy(halfway, tmp_path / 'run')


def copy(source, target):
  subprocess.run(['cp', '-r', source, target], check=True)
  return target


def arrays(workdir, step):
  """All leaves of a checkpoint."""
  contents = Contents(workdir / 'checkpoints' / str(step))
  return dict(contents.read(list(contents.shapes)))


def assert_same_run(workdir, straight):
  for name in ('metrics.jsonl', 'samples.jsonl'):
    assert records(workdir, name) == records(straight, name)
  ours, theirs = arrays(workdir, 8), arrays(straight, 8)
  assert ours.keys() == theirs.keys() and len(ours) > 30
  assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_stopped_run_resumes_bit_by_bit(settings, stopped, straight, cache):
  lines = records(straight)
  assert len(lines) == 8 + 4
  assert records(stopped) == [line for line in lines if line['step'] <= 4]
  run(settings, stopped, cache)
  assert_same_run(stopped, straight)


def assert_close(ours, theirs):
  for got, want in zip(ours, theirs, strict=True):
    assert got == pytest.approx(want, rel=1e-4), (got, want)


@pytest.mark.full  # with another mesh: test_a_run_resumes_on_another_mesh_with_layers_stacked_or_not
def test_layers_may_be_stacked_on_resume(settings, straight, stopped, cache):
  assert_close(run(configs.override(settings, {'compute.scan': True}), stopped, cache), records(straight))


@pytest.mark.full
def test_layers_keep_their_order_when_they_are_unstacked_and_stacked_again(settings, tmp_path, cache):
  settings = configs.override(settings, {'model.layers': 2})
  for scan, stop_at in ((True, 3), (False, 6), (True, 0)):
    lines = run(configs.override(settings, {'compute.scan': scan}), tmp_path / 'run', cache, stop_at=stop_at)
  assert_close(lines, run(settings, tmp_path / 'straight', cache))


def test_a_checkpoint_of_another_version_is_refused(settings, stopped, cache):
  folder = stopped / 'checkpoints' / '4'
  facts = read_manifest(folder)['facts']
  (folder / 'manifest.json').unlink()
  write_manifest(folder, facts | {'version': 0})
  with pytest.raises(UserError, match='it has version 0, and this code reads version 2'):
    train(settings, options(stopped, cache))


@pytest.mark.full
def test_frozen_parameters_are_saved_and_resumed_and_may_not_change(settings, tmp_path, cache):
  settings = configs.override(settings, {'frozen': ('tokens/*', 'blocks/0/attention/*')})
  run(settings, tmp_path / 'straight', cache)
  run(settings, tmp_path / 'run', cache, stop_at=3)
  run(settings, tmp_path / 'run', cache)
  assert_same_run(tmp_path / 'run', tmp_path / 'straight')
  first, last = (arrays(tmp_path / 'run', step) for step in (6, 8))
  frozen = [name for name in last if 'frozen' in name]
  assert len(frozen) == 9 and all((first[name] == last[name]).all() for name in frozen)
  loaded = load_trained(tmp_path / 'run').parameters
  saved = {name: value for name, value in last.items() if name.startswith(('trained/', 'frozen/'))}
  assert len(loaded) == len(saved)
  assert all((np.asarray(loaded[name.partition('/')[2]]) == value).all() for name, value in saved.items())
  with pytest.raises(UserError, match='frozen'):
    train(configs.override(settings, {'frozen': (), 'steps': 9}), options(tmp_path / 'run', cache, accept_changes=True))


KILLED = """
import json, os, pathlib, signal, sys, time
import conftest
conftest._set_up_jax(sys.argv[5] == 'True')
from tiny import config, run
from gptjax.training import logbook
workdir = pathlib.Path(sys.argv[2])
write = logbook.Logbook._write

def write_until_killed(self, name, record):
  if record['step'] < 6:
    return write(self, name, record)
  while not (workdir / 'checkpoints' / '3').exists():
    time.sleep(0.01)
  self._files[name].write(json.dumps(record)[:30])
  os.kill(os.getpid(), signal.SIGKILL)

logbook.Logbook._write = write_until_killed
run(config(sys.argv[1], **json.loads(sys.argv[4])), workdir, sys.argv[3])
"""


@pytest.mark.full
def test_a_killed_run_resumes_bit_by_bit(settings, straight, tmp_path, cache, pytestconfig):
  # Killed in the middle of a line of step 6; the last checkpoint is of step 3.
  workdir = tmp_path / 'run'
  # The same settings of JAX: with other checks of types the program, and so the last bit, would be another.
  killed = subprocess.run([sys.executable, '-c', KILLED, settings.data.source.path, workdir, cache, json.dumps(SETTINGS),
                           str(pytestconfig.getoption('--typed'))],
                          capture_output=True, text=True, env=os.environ | {'PYTHONPATH': f'{TESTS}:{TESTS.parent}'})
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  left = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
  assert '"step": 5' in left[-2] and not left[-1].endswith('\n')
  run(settings, workdir, cache)
  assert_same_run(workdir, straight)


def test_fields_that_keep_the_run_the_same_may_change(settings, stopped, tmp_path, cache, capsys):
  other = tmp_path / 'elsewhere' / 'text.txt'
  other.parent.mkdir()
  other.write_bytes(pathlib.Path(settings.data.source.path).read_bytes())
  values = {
    'steps': 9, 'batch_size': 8, 'microbatches': 1, 'zero_stage': 0, 'z_loss': 0.01, 'mesh.data': 1,
    'eval.every': 5, 'eval.rows': 0, 'eval.sample_tokens': 0, 'checkpoint.every': 2, 'checkpoint.keep': 1,
    'checkpoint.keep_best': True, 'optimizer.peak_lr': 2e-3, 'optimizer.muon_lr': 0.01, 'optimizer.schedule': 'wsd',
    'optimizer.warmup': 1, 'optimizer.decay': 2, 'optimizer.final_fraction': 0.0, 'optimizer.b1': 0.8,
    'optimizer.b2': 0.9, 'optimizer.eps': 1e-7, 'optimizer.momentum': 0.9, 'optimizer.weight_decay': 0.0,
    'optimizer.clip': 0.0,
    'model.dropout': 0.0, 'compute.attention': 'xla', 'compute.remat': 'full', 'compute.scan': True,
    'data.source.path': str(other), 'data.prefetch': 0}
  changed = configs.override(settings, values)
  maths = {name for name in values if name.startswith('optimizer.')} | {'steps', 'z_loss', 'model.dropout'}
  with pytest.raises(UserError, match='--accept_changes') as caught:
    train(changed, options(stopped, cache))
  named = str(caught.value).partition('all changes: ')[2]
  assert {change.split(' ')[0] for change in named.split('; ')} == maths
  before = records(stopped)
  lines = run(changed, stopped, cache, accept_changes=True)
  assert lines[:len(before)] == before
  assert [line['step'] for line in lines[len(before):]] == [5, 5, 6, 6, 7, 8, 8, 9, 9]
  tokens = [line['tokens'] for line in lines if 'tokens' in line]
  rows = train_rows(changed, prepare(changed.data, cache))
  assert tokens[4] - tokens[3] == rows.batch(4 * 4 + np.arange(8))['mask'].sum()  # the rows continue
  kept = configs.from_json((stopped / 'config.json').read_text())
  assert {name for name, _ in configs.differences(kept, changed).items()} == {'model.vocab_size'}
  announced, = (line for line in capsys.readouterr().err.splitlines() if ' changed  ' in line)
  for name, (was, now) in configs.differences(settings, changed).items():
    assert f'{name} {was} -> {now}' in announced


@pytest.mark.parametrize('values, field, accepted', [
  ({'seed': 1}, 'seed', True), ({'model.layers': 2}, 'model.layers', False), ({'frozen': ('tokens/*',)}, 'frozen', False),
  ({'model.vocab_size': 64}, 'model.vocab_size', False), ({'data.context': 8}, 'data.context', False),
  ({'data.valid_fraction': 0.2}, 'data.valid_fraction', True), ({'data.isolate_documents': False}, 'data.isolate_documents', True),
  ({'data.tokenizer.kind': 'bytes'}, 'data.tokenizer.kind', False), ({'optimizer.name': 'adamw'}, 'optimizer.name', False),
])
def test_another_run_needs_another_workdir(values, field, accepted, settings, halfway, cache):
  contents = lambda: {path: path.read_bytes() for path in halfway.rglob('*') if path.is_file() and path.name != 'lock'}
  before = contents()
  (name, value), = values.items()
  was = configs.flatten(configs.from_json((halfway / 'config.json').read_text()))[name]
  with pytest.raises(UserError) as caught:
    train(configs.override(settings, values), options(halfway, cache))
  assert str(caught.value).startswith(f'{field}: {value!r}, expected: {was!r}, ')
  assert ('--accept_changes' in str(caught.value)) == accepted  # where that would not help, it is not suggested
  assert contents() == before


def test_each_checkpoint_identifies_its_run(settings, stopped, cache):
  (stopped / 'config.json').unlink()
  with pytest.raises(UserError, match='^seed: 1, expected: 0, with which this workdir was started'):
    train(configs.override(settings, {'seed': 1}), options(stopped, cache))


@pytest.mark.full  # masks do not depend on them: tests/training/test_step.py
def test_microbatches_may_change_although_there_is_dropout(settings, stopped, cache):
  # Masks depend on the rows alone; that losses stay equal is shown by the tests of the step.
  assert settings.model.dropout and settings.microbatches != 1
  lines = run(configs.override(settings, {'microbatches': 1}), stopped, cache)
  assert lines[-1]['step'] == settings.steps


@pytest.mark.parametrize('end', ['one more line.\n', 'Ä'])
def test_changed_data_is_an_error(end, settings, halfway, tmp_path, cache):
  changed = tmp_path / 'text.txt'
  changed.write_text(pathlib.Path(settings.data.source.path).read_text() + end)
  before = (halfway / 'config.json').read_bytes()
  with pytest.raises(UserError, match=r'^data: .*another --workdir for other data'):
    train(configs.override(settings, {'data.source.path': str(changed)}), options(halfway, cache))
  assert (halfway / 'config.json').read_bytes() == before


@pytest.mark.parametrize('values', [
  full({'mesh.data': 1, 'zero_stage': 0}), full({'mesh.model': 2}), {'mesh.model': 2, 'compute.scan': True}], ids=str)
def test_a_run_resumes_on_another_mesh_with_layers_stacked_or_not(values, settings, stopped, straight, cache):
  lines = run(configs.override(settings, values | {'eval.sample_tokens': 0}), stopped, cache)
  for ours, theirs in zip(lines, records(straight), strict=True):
    np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-4, err_msg=f'{ours}\n{theirs}')


def test_another_batch_size_needs_durations_in_steps(settings, stopped, cache):
  changed = configs.override(settings, {'steps': '1 epoch', 'optimizer.warmup': '64 tokens', 'batch_size': 8})
  with pytest.raises(UserError, match='batch_size 4 -> 8'):
    train(changed, options(stopped, cache))


def test_a_workdir_without_a_checkpoint_may_start_any_run(settings, tmp_path, cache):
  with pytest.raises(UserError, match='^init_from: '):
    train(configs.override(settings, {'init_from': str(tmp_path / 'mistyped'), 'seed': 3}), options(tmp_path / 'run', cache))
  assert not (tmp_path / 'run').exists()
  (tmp_path / 'run').mkdir()
  (tmp_path / 'run' / 'config.json').write_text(configs.to_json(configs.override(settings, {'seed': 3})))
  assert run(settings, tmp_path / 'run', cache, stop_at=1)[0]['step'] == 1
