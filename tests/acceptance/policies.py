"""Trains while something is made not finite, under each policy.

    python -m tests.acceptance.policies --config=... --workdir=DIR --cpu_devices=8

In the batch of step 8, in the gradient of step 8, or on one device after step 7; with ZeRO 0 and 3. Prints a JSON list of cases, each
with what happened in words, and what of it is wrong.
"""

import dataclasses
import itertools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from absl import flags

from gptjax import config as configs
from gptjax import train as command  # noqa: F401  (its flags)
from gptjax.config import Config, Fault, UserError
from gptjax.start import start
from tests.acceptance.disturbed import committed, figures, whole

_BAD, _STEPS = 8, 12
_MESHES = {'8 data, ZeRO 0': (1, 8, 0), '8 data, ZeRO 3': (1, 8, 3), '2 replicas x 4 data, ZeRO 3': (2, 4, 3)}


@dataclasses.dataclass
class Trained:
  """The outcome of a run."""

  workdir: Path
  ended: str
  """with which error, '' where it came to its end"""
  states: dict[int, Any]
  """after each step, as first made and as last made"""
  said: list[str]


def main(config: Config) -> None:
  cache, folder = start(config), Path(flags.FLAGS.workdir)
  config = configs.override(config, {'checkpoint.every': 3, 'checkpoint.keep': 5, 'faults.compare_every': 2, 'eval.every': 0,
                                     'batch_size': 16, 'steps': _STEPS, 'optimizer.warmup': 2})
  found = []
  for name, (replica, data, stage) in _MESHES.items():
    settings = configs.override(config, {'mesh.replica': replica, 'mesh.data': data, 'zero_stage': stage})
    straight = run(settings, folder / 'straight', cache)
    for where, policy in itertools.product(('batch', 'gradient', 'one device') if replica == 1 else ('one device',),
                                           ('stop', 'skip', 'rollback')):
      settings = configs.override(settings, {'faults.bad_step': policy})
      with disturbance(where, settings, cache):
        disturbed = run(settings, folder / 'run', cache)
      wrong = judged(where, policy, disturbed, straight)
      if disturbed.ended:  # the same command again, with nothing in its way
        again = run(settings, folder / 'run', cache)
        wrong += [] if same(again, straight) else ['the same command again does not come to the undisturbed end']
      words = disturbed.ended or f'goes on to its end; {[line for line in disturbed.said if "back to" in line or "not applied" in line]}'
      found.append({'mesh': name, 'where': where, 'policy': policy, 'words': words, 'wrong': wrong})
      print(json.dumps(found[-1]), file=sys.stderr, flush=True)
      shutil.rmtree(folder / 'run')
    shutil.rmtree(folder / 'straight')
  print(json.dumps(found))


def run(config: Config, workdir: Path, cache: Path) -> Trained:
  """Trains, and keeps every state."""
  import jax
  from gptjax.training import Options, loop, train
  states: dict[int, Any] = {}
  said: list[str] = []
  after, say = loop._Loop._after_step, loop.Logbook.say

  def keep(self, last):
    wish = after(self, last)
    states[self.steps.step] = jax.device_get(self.steps.state)
    return wish

  def hear(self, line):
    said.append(line)
    say(self, line)

  ended = ''
  with mock.patch.object(loop._Loop, '_after_step', keep), mock.patch.object(loop.Logbook, 'say', hear):
    try:
      train(config, Options(workdir, cache, log_every=1))
    except (UserError, Fault) as error:
      ended = f'{type(error).__name__}: {error}'
  return Trained(workdir, ended, states, said)


def disturbance(where: str, config: Config, cache: Path):
  """A context in which something is not finite once."""
  from gptjax.training import batches, loop
  from gptjax.training import run as resolving
  if where == 'one device':
    return mock.patch.object(loop._Loop, '_after_step', _erring(loop._Loop._after_step))
  tokens = _batch(config, cache)
  if where == 'batch':
    place = batches.put_rows

    def spoiled(mesh, batch, size):
      if (batch['tokens'] == tokens).all():
        mask = batch['mask'].copy()
        mask[3, 5] = np.nan
        batch = batch | {'mask': mask}
      return place(mesh, batch, size)

    return mock.patch.object(batches, 'put_rows', spoiled)
  return mock.patch.object(resolving, 'make_objective', lambda config: _with_bad_gradient(int(tokens.sum())))


def _batch(config: Config, cache: Path) -> np.ndarray:
  """The tokens of the bad step."""
  from gptjax.data import prepare, train_rows
  first = config.batch_size * (_BAD - 1)
  return train_rows(config, prepare(config.data, cache)).batch(first + np.arange(config.batch_size))['tokens']


def _with_bad_gradient(total: int):
  """The objective whose loss is always right, and whose gradient has not a number for the batch whose ids sum up to `total`."""
  import jax
  import jax.numpy as jnp
  from gptjax.sharding import batch_psum
  from gptjax.training import next_token
  objective = next_token(0.0)

  @jax.custom_jvp
  def same(loss, bad):
    return loss

  @same.defjvp
  def _(values, tangents):
    loss, bad = values
    return loss, tangents[0] * jnp.where(bad, jnp.nan, 1.0)

  def wrapped(head, hidden, batch):
    found = objective(head, hidden, batch)
    bad = batch_psum(jnp.sum(batch['tokens'])) == total
    return found._replace(loss=same(found.loss, bad.astype(jnp.float32)))

  return wrapped


def _erring(after):
  """The end of a step that, once, leaves NaN in what one device holds of a matrix."""
  import jax
  left = [_BAD - 1]

  def err(self, last):
    if left == [self.steps.step]:
      left.clear()
      name = next(name for name in self.steps.state.trained if name.endswith('up/kernel'))
      array = self.steps.state.trained[name]
      parts = [np.array(shard.data) for shard in array.addressable_shards]
      parts[2][:1] = np.nan
      array = jax.make_array_from_single_device_arrays(array.shape, array.sharding, [
        jax.device_put(part, shard.device) for part, shard in zip(parts, array.addressable_shards)])
      self.steps.state = self.steps.state._replace(trained=self.steps.state.trained | {name: array})
    return after(self, last)

  return err


def same(one: Trained, other: Trained, last: int = _STEPS) -> bool:
  """Whether two runs have the same metrics and, at their ends, the same state, bit by bit."""
  lines = [[line for line in figures(run.workdir) if line['step'] <= last] for run in (one, other)]
  return lines[0] == lines[1] and (last not in one.states or equal(one.states[last], other.states[last]))


def equal(one: Any, other: Any) -> bool:
  import jax
  return all(a.tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def judged(where: str, policy: str, run: Trained, straight: Trained) -> list[str]:
  """The broken promises of a disturbed run."""
  said, lines = ' '.join(run.said), figures(run.workdir)
  device = where == 'one device'
  checks = {'every checkpoint is whole': whole(run.workdir) == committed(run.workdir) != []}
  if device and policy != 'rollback':
    checks['it ends, and names the device and the step'] = (
      run.ended.startswith('Fault') and re.findall(r'device \d', run.ended) == ['device 2'] and f'step {_BAD}' in run.ended)
    checks['nothing bad is kept'] = committed(run.workdir) == [3, 6]
  elif device:
    checks['back to the last checkpoint'] = not run.ended and 'back to step 6' in said
    checks['the undisturbed end'] = same(run, straight)
  elif policy == 'stop':
    checks['it ends and names the rows'] = run.ended.startswith('UserError') and all(
      text in run.ended for text in (f'step {_BAD} is bad', 'rows 112 to 127'))
    checks['undisturbed before'] = same(run, straight, _BAD - 1) and committed(run.workdir) == [3, 6]
  elif policy == 'skip':
    checks['that update alone is not made'] = equal(run.states[_BAD][1:], run.states[_BAD - 1][1:]) and not equal(
      run.states[_BAD + 1].parameters, run.states[_BAD].parameters)
    checks['undisturbed before'] = same(run, straight, _BAD - 1)
    checks['the others are good'] = not run.ended and [line['step'] for line in lines if None in line.values()] == [_BAD]
  else:
    checks['back to the last checkpoint, past the rows'] = not run.ended and 'back to step 6' in said and (
      'rows 112 to 127 are skipped' in said)
    checks['undisturbed before'] = same(run, straight, _BAD - 1)
    checks['the others are good'] = not any(None in line.values() for line in lines) and [line['step'] for line in lines][:_STEPS] == [
      *range(1, _STEPS + 1)]
  return [name for name, holds in checks.items() if not holds]


if __name__ == '__main__':
  configs.run(main)
