"""A save that ends early does not affect earlier checkpoints or later saves."""

import asyncio
import multiprocessing
import random
import shutil
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorstore
from jax.sharding import SingleDeviceSharding
from tiny import small_disk

from gptjax import start
from gptjax.checkpoint import Checkpoints, Progress, Retention, manifest
from gptjax.checkpoint import checkpoints as checkpoints_module
from gptjax.config import UserError

SIZE = 2**21  # float32 each of four arrays: a save takes long enough to be killed in


def described():
  one = SingleDeviceSharding(jax.devices()[0])
  return {str(i): jax.ShapeDtypeStruct((SIZE,), np.float32, sharding=one) for i in range(4)}


def state(step):
  return {str(i): jax.device_put(np.arange(SIZE, dtype=np.float32) * (step + i / 8)) for i in range(4)}


def assert_good(checkpoints, step):
  restored, progress = checkpoints.restore(step, described())
  assert progress.step == step
  assert all((restored[name] == value).all() for name, value in state(step).items())


def save_on_and_on(folder, committed):
  """Resumes from the latest checkpoint and saves, as a run does; prints each step that is on disk."""
  jax.config.update('jax_platforms', 'cpu')
  checkpoints = Checkpoints(folder, Retention(latest=2))
  step = max(checkpoints.steps(), default=0)
  if step:
    assert_good(checkpoints, step)
  while True:
    step += 1
    checkpoints.save(Progress(step), state(step), None)
    checkpoints.wait()
    committed.send(step)


@pytest.mark.full
def test_a_kill_during_a_save_loses_no_earlier_checkpoint(tmp_path):
  processes = multiprocessing.get_context('forkserver')
  processes.set_forkserver_preload(['gptjax.checkpoint'])
  dice, interrupted, committed = random.Random(0), 0, 0
  for _ in range(5):
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=save_on_and_on, args=(tmp_path, sender))
    process.start()
    sender.close()
    seen = [receiver.recv(), receiver.recv()]  # raises EOFError where the process could not go on
    assert seen[0] > committed
    while not list(tmp_path.glob('*-tmp')):
      time.sleep(0.0005)
    time.sleep(dice.uniform(0, 0.03))
    process.kill()
    process.join()
    while receiver.poll():
      try:
        seen.append(receiver.recv())
      except EOFError:
        break
    committed = seen[-1]
    interrupted += bool(list(tmp_path.glob('*-tmp')))
    reader = Checkpoints(tmp_path)
    assert reader.steps()[-1] in (committed, committed + 1)  # it may be on disk before it is reported
    for step in reader.steps()[-2:]:
      assert_good(reader, step)
    reader.close()
  assert interrupted >= 2, 'the kills came too late to test anything'


def test_a_full_disk_is_a_one_line_error_and_loses_no_earlier_checkpoint(tmp_path):
  with small_disk(tmp_path / 'disk', '80m') as disk:
    checkpoints = Checkpoints(disk / 'checkpoints', Retention(latest=5))
    for step in (1, 2):
      checkpoints.save(Progress(step), state(step), None)
    checkpoints.save(Progress(3), state(3), None)
    with pytest.raises(UserError, match=r"^checkpoint: '.*', expected: a disk with space left$"):
      checkpoints.wait()
    shutil.rmtree(disk / 'checkpoints' / '1')  # somebody makes space, and the same process saves the same step
    checkpoints.save(Progress(3), state(3), None)
    checkpoints.wait()
    checkpoints.save(Progress(4), state(4), None)
    with pytest.raises(UserError, match='a disk with space left'):
      checkpoints.close()
    resumed = Checkpoints(disk / 'checkpoints', Retention(latest=5))
    assert resumed.steps() == [2, 3] and not list((disk / 'checkpoints').glob('*.saving*'))
    for step in (2, 3):
      assert_good(resumed, step)
    resumed.close()


def test_a_save_that_another_process_did_not_complete_is_no_checkpoint(tmp_path, monkeypatch):
  join, one = manifest.write_manifest, {'x': np.arange(8.0)}

  def keep_and_join(folder, *more):
    shutil.copytree(folder, tmp_path / 'killed')  # what a kill leaves here
    join(folder, *more)

  monkeypatch.setattr(manifest, '_PATIENCE', 0.1)
  monkeypatch.setattr(checkpoints_module, 'write_manifest', keep_and_join)
  monkeypatch.setattr(checkpoints_module, 'process_group', lambda: SimpleNamespace(index=0, count=2))
  folder = tmp_path / 'checkpoints'
  checkpoints = Checkpoints(folder, Retention())
  checkpoints.save(Progress(1), one, None)
  with pytest.raises(UserError, match='expected: a save that all processes complete; another process failed'):
    checkpoints.wait()
  assert not list(folder.iterdir())
  monkeypatch.undo()
  for name in ('1', '1.saving'):
    shutil.copytree(tmp_path / 'killed', folder / name)
  with pytest.raises(UserError, match='all are damaged .1: manifest.json is missing'):
    Checkpoints(folder).newest()
  (folder / '1').rename(folder / '1.dropped')
  with Checkpoints(folder, Retention()) as checkpoints:
    checkpoints.save(Progress(1), one, None)
  assert [path.name for path in folder.iterdir()] == ['1'] and Checkpoints(folder).newest() == 1
  assert not list(folder.rglob('*.part'))


def test_threads_of_a_failed_save_print_nothing(monkeypatch, capfd):
  monkeypatch.setattr(sys, 'unraisablehook', start._report_unraisable)
  promise, future = tensorstore.Promise.new()

  async def give_up():  # as Orbax does at the first array that finds no space
    waiting = asyncio.ensure_future(_result(future))
    await asyncio.sleep(0)
    return waiting

  loop = asyncio.new_event_loop()
  waiting = loop.run_until_complete(give_up())
  loop.close()
  promise.set_result(1)
  time.sleep(0.1)
  waiting._log_destroy_pending = False
  assert 'closed' not in capfd.readouterr().err


async def _result(future):
  return await future
