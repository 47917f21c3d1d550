"""Checkpoints are restored bitwise on any mesh; retention keeps the right ones; a mismatch is a one-line error."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from tiers import full

from gptjax.checkpoint import Checkpoints, Progress, Retention, arrays
from gptjax.config import ComputeConfig, Fault, MeshConfig, ModelConfig, OptimizerConfig, UserError
from gptjax.model import abstract_model
from gptjax.sharding import make_mesh
from gptjax.training import TrainState, abstract, initializer, make_optimizer

# What Orbax was still reading when it failed.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')

MODEL = ModelConfig(layers=2, width=32, heads=4, vocab_size=50)
SCAN = ComputeConfig(scan=True)
SMALL = {'x': jax.ShapeDtypeStruct((3,), np.float32, sharding=SingleDeviceSharding(jax.devices()[0]))}
PROGRESS = Progress(step=7, rows=2**40, tokens=2**62 + 1)
LAYOUTS = [((8, 1), 3), ((4, 2), 0), ((4, 2), 3), ((1, 1), 0), ((2, 4), 3)]


def description(model=MODEL, optimizer='muon', devices=(1, 1), zero_stage=0, compute=SCAN):
  """The abstract train state of a run."""
  mesh = make_mesh(MeshConfig(*devices))
  with jax.set_mesh(mesh):
    tools = make_optimizer(OptimizerConfig(name=optimizer))
    return abstract(initializer(abstract_model(model, compute, 16), tools, zero_stage, mesh, 0), mesh)


def fill(described, seed=0):
  """Arrays of these shapes, dtypes and shardings, no value twice."""
  rng = np.random.default_rng(seed)
  draw = lambda s: (rng.permuted(np.arange(s.size)).reshape(s.shape) + rng.random()).astype(s.dtype)
  return jax.tree.map(lambda s: jax.device_put(draw(s), s.sharding), described)


def saved(folder, steps=(1,), config=None, losses=None):
  """Checkpoints of small states, open for writing."""
  checkpoints = Checkpoints(folder, config or Retention(latest=100))
  for step in steps:
    checkpoints.save(Progress(step), {'x': np.full(3, step, np.float32)}, (losses or {}).get(step))
  checkpoints.wait()
  return checkpoints


@pytest.mark.parametrize('source', [LAYOUTS[0], full(LAYOUTS[1])])
def test_a_train_state_is_restored_bitwise_on_any_mesh(source, tmp_path):
  state = fill(description(devices=source[0], zero_stage=source[1]))
  checkpoints = Checkpoints(tmp_path / 'checkpoints', Retention())
  checkpoints.save(PROGRESS, state, 1.0)
  checkpoints.close()
  for devices, zero_stage in LAYOUTS:
    target = description(devices=devices, zero_stage=zero_stage)
    checkpoints = Checkpoints(tmp_path / 'checkpoints', Retention())
    restored, progress = checkpoints.restore(7, target)
    assert progress == PROGRESS and isinstance(restored, TrainState)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for (path, got), want, like in zip(jax.tree.leaves_with_path(restored), *map(jax.tree.leaves, (state, target))):
      assert np.array(got).tobytes() == np.array(want).tobytes() and got.dtype == want.dtype, path
      assert got.sharding == like.sharding, path
    # On to the next mesh from here, as a run would that moves from one machine to another.
    shutil.rmtree(tmp_path / 'checkpoints')
    checkpoints = Checkpoints(tmp_path / 'checkpoints', Retention())
    checkpoints.save(PROGRESS, restored, None)
    checkpoints.close()


def test_a_restored_state_can_be_donated(tmp_path):
  checkpoints = Checkpoints(tmp_path, Retention())
  target = description(devices=(4, 2), zero_stage=3)
  checkpoints.save(Progress(1), fill(target), None)
  checkpoints.wait()
  state, _ = checkpoints.restore(1, target)
  shardings = jax.tree.map(lambda s: s.sharding, target)
  jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0, out_shardings=shardings)(state)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_paths_are_taken_literally(tmp_path):
  for name in ('lr[1e-3]', 'a**b', 'a?', 'p%20 q#x{y}', 'é\n你', '~', 'a::b|zip:'):
    saved(tmp_path / name).close()
    shutil.move(tmp_path / name, tmp_path / 'moved')
    assert Checkpoints(tmp_path / 'moved').restore(1, SMALL)[0]['x'].tolist() == [1] * 3
    shutil.move(tmp_path / 'moved', tmp_path / name)
    assert Checkpoints(tmp_path / name).restore(1, SMALL)[0]['x'].tolist() == [1] * 3
  assert os.fspath(arrays._LocalPath('/gs/bucket') / 'x') == '/gs/bucket/x'


@pytest.mark.parametrize('name', ['a\\b', 'latin1-\udce9'])
def test_a_path_that_tensorstore_cannot_use_is_refused_at_the_start(name, tmp_path):
  with pytest.raises(UserError, match='expected: a path in UTF-8 without backslashes'):
    Checkpoints(tmp_path / name, Retention())
  assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_cannot_be_read_back_is_not_committed(tmp_path, monkeypatch):
  monkeypatch.setattr(arrays._LocalPath, 'glob', lambda self, pattern: iter(()))  # so Orbax finds nothing to merge, and reports no error
  with pytest.raises(Fault, match='cannot read back what it has written'):
    saved(tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('keep_best, losses, kept', [
  (False, {step: float(step) for step in range(1, 7)}, [5, 6]),
  (True, {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0, 5: 5.0, 6: 6.0}, [2, 5, 6]),
  (True, {1: 3.0, 4: 2.0}, [4, 5, 6]),  # of the others nothing is known
  (True, {2: 3.0, 3: float('nan'), 5: float('-inf')}, [2, 5, 6]),
  (True, {}, [5, 6]),
])
def test_latest_and_best_checkpoints_are_kept(keep_best, losses, kept, tmp_path):
  config = Retention(latest=2, best=keep_best)
  checkpoints = saved(tmp_path, range(1, 4), config, losses)
  checkpoints.close()
  checkpoints = saved(tmp_path, range(4, 7), config, losses)  # a resumed run forgets nothing
  checkpoints.close()
  again = Checkpoints(tmp_path)
  assert again.steps() == kept
  for step in kept:
    assert again.restore(step, SMALL)[0]['x'].tolist() == [step] * 3
  again.close()


def test_a_checkpoint_is_found_by_name_or_number(tmp_path):
  checkpoints = saved(tmp_path, (2, 10, 4), losses={2: 2.0, 4: 1.0, 10: 3.0})
  assert checkpoints.steps() == [2, 4, 10]
  assert [checkpoints.resolve(name) for name in ('latest', 'best', '2', '10')] == [10, 4, 2, 10]
  for name in ('3', '-2', '2.0', '', 'newest'):
    with pytest.raises(UserError) as caught:
      checkpoints.resolve(name)
    assert str(caught.value) == f'--step: {name!r}, expected: latest, best, 2, 4, 10'


def test_best_requires_a_validated_checkpoint(tmp_path):
  with pytest.raises(UserError, match="^--step: 'best', expected: latest, 1$"):
    saved(tmp_path).resolve('best')


def test_a_folder_without_checkpoints_is_an_error(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints')
  assert checkpoints.steps() == []
  for name in ('latest', 'best', '1'):
    with pytest.raises(UserError, match=r"^--workdir: '.*run', expected: a folder with checkpoints"):
      checkpoints.resolve(name)


def test_parameters_are_restored_without_optimizer_state(tmp_path):
  target = description()
  state = fill(target)
  checkpoints = Checkpoints(tmp_path, Retention())
  checkpoints.save(Progress(1), state, None)
  checkpoints.close()
  before = len(jax.live_arrays())
  reader = Checkpoints(tmp_path)
  parameters = reader.restore_parameters(1, target.parameters)
  reader.close()
  assert len(jax.live_arrays()) == before + len(parameters)  # no optimizer state was allocated
  assert parameters.keys() == state.parameters.keys()
  assert all((np.array(parameters[name]) == np.array(state.parameters[name])).all() for name in parameters)


@pytest.mark.parametrize('change', [
  *({'model': dataclasses.replace(MODEL, **field)} for field in ({'width': 64}, {'layers': 3}, {'tied': False}, {'bias': False})),
  {'compute': ComputeConfig()}, {'optimizer': 'adamw'}], ids=str)
def test_a_checkpoint_of_another_config_is_a_one_line_error(change, tmp_path):
  checkpoints = Checkpoints(tmp_path, Retention())
  checkpoints.save(Progress(1), fill(description()), None)
  checkpoints.wait()
  with pytest.raises(UserError, match=r"^checkpoint: '.*/1', expected: an intact checkpoint of this config; ") as caught:
    checkpoints.restore(1, description(**change))
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize('lost', ['training', 'manifest.json', 'training/manifest.ocdbt', 'training/_METADATA'])
def test_a_damaged_checkpoint_is_a_one_line_error_and_others_still_load(lost, tmp_path):
  saved(tmp_path, (1, 2)).close()
  path = tmp_path / '2' / lost
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  checkpoints = Checkpoints(tmp_path, Retention())
  with pytest.raises(UserError, match=r"^checkpoint: '.*/2', ") as caught:
    checkpoints.restore(2, SMALL)
  assert '\n' not in str(caught.value)
  assert checkpoints.restore(1, SMALL)[1].step == 1
