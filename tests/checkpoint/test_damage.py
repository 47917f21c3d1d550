"""A damaged checkpoint is reported with its file and moved away by its run, which uses the one before."""

import errno
import os
import random
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from gptjax.checkpoint import DAMAGED, PARAMETERS, Checkpoints, Progress, Retention, manifest
from gptjax.checkpoint import checkpoints as checkpoints_module
from gptjax.config import Fault, UserError

SHAPE = jax.ShapeDtypeStruct((64, 5), np.float32, sharding=SingleDeviceSharding(jax.devices()[0]))
ABSTRACT = {'trained': {'a': SHAPE}, 'optimizer': {'b': SHAPE}}


def state(step):
  return {part: {name: np.full((64, 5), step + i, np.float32)} for i, (part, name) in enumerate([('trained', 'a'), ('optimizer', 'b')])}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A workdir with checkpoints 10 and 20, each with a file and a folder beside its state."""
  folder = tmp_path_factory.mktemp('run')
  (folder / 'config.json').write_text('{"a": 1}')
  (folder / 'tokenizer').mkdir()
  (folder / 'tokenizer' / 'rules.json').write_text('{}')
  checkpoints = Checkpoints(folder / 'checkpoints', Retention(), extra_files=(folder / 'config.json', folder / 'tokenizer'))
  for step in (10, 20):
    checkpoints.save(Progress(step, 4 * step, 9 * step), state(step), None)
  checkpoints.close()
  return folder


@pytest.fixture
def workdir(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'run')


def files(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


def damage(path, how, dice):
  data = bytearray(path.read_bytes())
  match how:
    case 'flip':
      data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
      path.write_bytes(data)
    case 'truncate':
      path.write_bytes(data[:dice.randrange(len(data))])
    case 'empty':
      path.write_bytes(b'')
    case 'remove':
      path.unlink()


def test_a_checkpoint_contains_extra_files_and_a_manifest(saved):
  names = {str(path.relative_to(saved / 'checkpoints' / '20')) for path in files(saved / 'checkpoints' / '20')}
  assert {'manifest.json', 'config.json', 'tokenizer/rules.json', 'parameters/_METADATA', 'training/_METADATA'} <= names
  assert not list(saved.rglob('*.saving*'))


@pytest.mark.parametrize('how', ['flip', 'truncate', 'empty', 'remove'])
def test_damage_of_any_file_is_found(how, workdir, capsys):
  dice = random.Random(how)
  folder = workdir / 'checkpoints' / '20'
  for path in files(folder):
    if not path.stat().st_size and how != 'remove':
      continue  # an empty file has nothing to lose
    intact, inside = path.read_bytes(), path.relative_to(folder)
    damage(path, how, dice)
    checkpoints = Checkpoints(workdir / 'checkpoints')
    assert checkpoints.resolve('latest') == 10
    assert f'checkpoint 20 is damaged: {inside} ' in capsys.readouterr().err
    with pytest.raises(UserError, match=f'^checkpoint: .*/20.*{inside}'):
      checkpoints.restore(20, ABSTRACT)
    checkpoints = Checkpoints(workdir / 'checkpoints', folders=(PARAMETERS,))  # who reads no optimizer state does not miss it
    if inside.parts[0] == 'training':
      assert checkpoints.resolve('latest') == 20
      assert (checkpoints.restore_parameters(20, ABSTRACT['trained'])['a'] == 20).all()
    else:
      assert checkpoints.resolve('latest') == 10
      with pytest.raises(UserError, match=f'^checkpoint: .*/20.*{inside}'):
        checkpoints.restore_parameters(20, ABSTRACT['trained'])
    path.write_bytes(intact)
  assert Checkpoints(workdir / 'checkpoints').newest() == 20


def test_a_run_moves_damaged_checkpoints_and_resumes_from_the_one_before(workdir, capsys):
  damage(workdir / 'checkpoints' / '20' / 'training' / 'manifest.ocdbt', 'flip', random.Random(0))
  checkpoints = Checkpoints(workdir / 'checkpoints', Retention())
  assert checkpoints.newest() == 10 and checkpoints.steps() == [10]
  restored, progress = checkpoints.restore(10, ABSTRACT)
  assert progress == Progress(10, 40, 90)
  assert jax.tree.all(jax.tree.map(lambda one, other: (one == other).all(), restored, state(10)))
  aside, = (workdir / DAMAGED).iterdir()
  assert aside.name.startswith('20-') and str(aside) in capsys.readouterr().err
  checkpoints.save(Progress(20), state(20), None)
  checkpoints.close()
  assert Checkpoints(workdir / 'checkpoints').newest() == 20


def test_only_folders_named_after_a_step_are_checkpoints(workdir):
  for name in ('0300', '\u0663', '40x'):
    (workdir / 'checkpoints' / name).mkdir()
  assert Checkpoints(workdir / 'checkpoints', Retention()).newest() == 20


def test_if_all_checkpoints_are_damaged_nothing_is_overwritten(workdir):
  for step in ('10', '20'):
    (workdir / 'checkpoints' / step / 'manifest.json').unlink()
  for retention in (None, Retention(), Retention()):  # given again, the command ends alike
    checkpoints = Checkpoints(workdir / 'checkpoints', retention)
    with pytest.raises(UserError, match=r'but all are damaged \(20: manifest.json is missing; 10: manifest.json is missing\)$'):
      checkpoints.newest()
    assert checkpoints.steps() == [10, 20]


def test_checkpoints_of_this_process_are_verified_too(workdir):
  with Checkpoints(workdir / 'checkpoints', Retention(latest=0)) as checkpoints:
    checkpoints.save(Progress(30), state(30), None)
    checkpoints.wait()
    file = max((workdir / 'checkpoints' / '30').rglob('d/*'), key=lambda path: path.stat().st_size)
    damage(file, 'flip', random.Random(0))
    assert checkpoints.newest() == 20


def test_an_unreadable_checkpoint_is_not_treated_as_damaged(workdir, monkeypatch):
  def away(*args):
    raise OSError(errno.EIO, os.strerror(errno.EIO))  # as reading does, it names no file

  monkeypatch.setattr(manifest, '_digest', away)
  checkpoints = Checkpoints(workdir / 'checkpoints', Retention())
  with pytest.raises(OSError, match='Input/output error: .*/checkpoints/20/'):
    checkpoints.newest()
  monkeypatch.undo()
  assert checkpoints.newest() == 20 and not (workdir / DAMAGED).exists()
  monkeypatch.setattr(ocp, 'load_checkpointables', away)
  with pytest.raises(Fault, match='checkpoints/20: .*Input/output error.*expected: a checkpoint that can be loaded'):
    checkpoints.restore(20, ABSTRACT)


def test_an_unreadable_checkpoint_does_not_prevent_saves(workdir, monkeypatch):
  def away(folder):
    if folder.name == '10':
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return manifest.read_manifest(folder)

  monkeypatch.setattr(checkpoints_module, 'read_manifest', away)
  with Checkpoints(workdir / 'checkpoints', Retention(latest=2)) as checkpoints:
    checkpoints.save(Progress(30), state(30), None)
    checkpoints.wait()
    assert checkpoints.steps() == [20, 30]


def test_a_checkpoint_removed_meanwhile_is_not_treated_as_damaged(workdir, monkeypatch, capsys):
  reader = Checkpoints(workdir / 'checkpoints')
  intact = reader._wrong

  def removed(step):
    if step == 20:
      (workdir / 'checkpoints' / '20').rename(workdir / 'checkpoints' / '30')
    return intact(step)

  monkeypatch.setattr(reader, '_wrong', removed)
  assert reader.newest() == 30 and not capsys.readouterr().err


def test_an_existing_checkpoint_is_not_replaced(workdir):
  before = (workdir / 'checkpoints' / '20' / 'manifest.json').read_bytes()
  with Checkpoints(workdir / 'checkpoints', Retention()) as checkpoints:
    checkpoints.save(Progress(20), state(7), None)
  assert (workdir / 'checkpoints' / '20' / 'manifest.json').read_bytes() == before
  assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'10', '20'}


def test_leftovers_of_a_kill_are_no_checkpoints_and_are_removed(workdir):
  for name in ('30.saving', '30.saving.orbax-checkpoint-tmp', '5.dropped'):
    shutil.copytree(workdir / 'checkpoints' / '20', workdir / 'checkpoints' / name)
  reader = Checkpoints(workdir / 'checkpoints')
  assert reader.steps() == [10, 20] and len(list((workdir / 'checkpoints').iterdir())) == 5
  assert Checkpoints(workdir / 'checkpoints', Retention()).steps() == [10, 20]
  assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'10', '20'}


@pytest.mark.parametrize('retention, kept', [
  (Retention(latest=2), {40, 50}), (Retention(latest=1, every=20), {20, 40, 50}), (Retention(latest=1, best=True), {20, 50}),
  (Retention(latest=0), {10, 20, 30, 40, 50}), (Retention(latest=1, every=30, best=True), {20, 30, 50})])
def test_retention_rules_are_combined(retention, kept):
  assert retention.kept({10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: 1.5}) == kept
