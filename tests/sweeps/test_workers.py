"""Workers share a folder: every trial is finished once, whoever is killed; early stopping and adaptive points follow their rules."""

import csv
import fcntl
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT

from gptjax.config import UserError
from gptjax.sweeps import (
  Adaptive, Choice, Halving, LogUniform, Queue, Sweep, Uniform, Worker, of_other_code, places, product, status_of, values)
from gptjax.sweeps import worker as working
from gptjax.sweeps.claims import Claims, is_claimed
from gptjax.sweeps.points import draws
from gptjax.sweeps.results import add_rung, end_trial
from gptjax.sweeps.sampling import adaptive_point

TRAIN = '''
import fcntl, json, pathlib, signal, sys, time
flags = dict(one.lstrip('-').partition('=')[::2] for one in sys.argv[1:])
folder, config = pathlib.Path(flags['workdir']), json.loads(pathlib.Path(flags['config']).read_text())
lock = (folder / 'lock').open('a')
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
file = folder / 'metrics.jsonl'
lines = file.read_text().splitlines() if file.exists() else []
if config['seed'] == 13:
  print('a line\\nit broke')
  sys.exit(1)
stopping = []
signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
for step in range(len(lines) + 1, int(flags.get('stop_at', config['steps'])) + 1):
  loss = config['optimizer']['peak_lr'] * 100 + config['seed'] / 1000 + 1 / step
  with file.open('a') as out:
    out.write(json.dumps({'step': step, 'loss': loss}) + '\\n')
  time.sleep(SECONDS)
  if stopping:
    sys.exit(75)
'''
"""A trainer that writes a line per step, goes on where it was, and saves at a signal."""


def sweep_of(folder, points, seconds=0.0, steps=6, **settings):
  path = folder / 'sweep.py'
  path.write_text('')
  (folder / 'train.py').write_text(TRAIN.replace('SECONDS', str(seconds)))
  return Sweep('configs/default.py', points, metric='loss', overrides={'steps': steps}, **settings), path


def work(queue, folder, workers=2, beat=2, monkeypatch=None):
  lines, lock, stop = [], threading.Lock(), threading.Event()
  monkeypatch.setattr(working, 'PROGRAM', (str(folder / 'train.py'),))
  threads = [threading.Thread(target=Worker(queue, lock, place, [], beat, stop, lines.append).run) for place in places(workers)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return lines


def test_every_trial_runs_once_and_failures_are_told_at_once(tmp_path, monkeypatch):
  sweep, path = sweep_of(tmp_path, product(values('optimizer.peak_lr', 1e-3, 2e-3), values('seed', 0, 13)))
  queue = Queue(sweep, path, tmp_path, 2)
  lines = work(queue, tmp_path, monkeypatch=monkeypatch)
  statuses = {trial.name: status_of(queue.folder(trial)) for trial in queue.trials}
  assert sorted(status.name for status in statuses.values()) == ['done', 'done', 'failed', 'failed']
  assert sum(line.startswith('started') for line in lines) == 4
  assert sum('status 1; the end of its log:\n  a line\n  it broke' in line for line in lines) == 2
  done, failed = (next(one for one in statuses.values() if one.name == name) for name in ('done', 'failed'))
  assert done.metrics['step'] == 6 and failed.error == 'status 1: it broke'
  assert not any(is_claimed(queue.folder(trial)) for trial in queue.trials)
  assert not any(line.startswith('started') for line in work(Queue(sweep, path, tmp_path, 2), tmp_path, monkeypatch=monkeypatch))
  (tmp_path / 'train.py').write_text((tmp_path / 'train.py').read_text().replace('== 13', '== 14'))
  again = Queue(sweep, path, tmp_path, 2)
  again.forget_failures()
  assert sum(line.startswith('started') for line in work(again, tmp_path, monkeypatch=monkeypatch)) == 2
  assert {status_of(again.folder(trial)).name for trial in again.trials} == {'done'}
  assert not of_other_code(again)
  file = again.folder(again.trials[1]) / 'trial.json'
  file.write_text(file.read_text().replace('"code": "', '"code": "0'))
  assert of_other_code(again) == [again.trials[1].name]


def test_a_claim_of_a_dead_worker_is_taken_over_once_and_its_owner_notices(tmp_path):
  beat = 0.5
  mine, first, second = (Claims(beat) for _ in range(3))
  claim = mine.take(tmp_path)
  assert claim and mine.take(tmp_path) is None
  alive = time.monotonic() + 3 * beat
  while time.monotonic() < alive:
    assert claim.beat() and first.take(tmp_path) is None and second.take(tmp_path) is None
    time.sleep(beat / 4)
  found = []
  while not found:
    found = [taken for claims in (first, second) if (taken := claims.take(tmp_path))]
    time.sleep(beat / 20)
  assert len(found) == 1  # how soon is a bar: sweep_kills
  assert not claim.beat() and found[0].beat()
  claim.release()  # of one that does not count leaves the other
  assert found[0].beat() and mine.take(tmp_path) is None
  found[0].release()
  last = Claims(beat).take(tmp_path)
  assert last and not claim.beat()  # the first owner, which still sleeps, never counts again
  claim.release()
  assert last.beat() and not Claims(beat).take(tmp_path)
  short = Claims(beat / 100)  # of workers with another beat
  time.sleep(beat / 2)
  assert short.take(tmp_path) is None and short.take(tmp_path) is None


def test_a_trial_waits_until_nobody_trains_in_its_workdir(tmp_path, monkeypatch):
  sweep, path = sweep_of(tmp_path, values('seed', 0))
  queue = Queue(sweep, path, tmp_path, 2)
  (folder := queue.folder(queue.trials[0])).mkdir(parents=True)
  with (folder / 'lock').open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    working_thread = threading.Thread(target=work, args=(queue, tmp_path), kwargs={'monkeypatch': monkeypatch})
    working_thread.start()
    time.sleep(1)
    assert not (folder / 'metrics.jsonl').exists() and status_of(folder).name == 'running'
  working_thread.join()
  assert status_of(folder).name == 'done'


def test_of_many_workers_one_gets_a_claim(tmp_path):
  for number in range(20):
    folder, found, barrier = tmp_path / str(number), [], threading.Barrier(8)
    folder.mkdir()

    def take(folder=folder, found=found, barrier=barrier):
      claims = Claims(1)
      barrier.wait()
      found.append(claims.take(folder))
    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert sum(one is not None for one in found) == 1


SCRIPT = '''
import sys
sys.orig_argv[1:] = ['-m', 'gptjax.sweep']  # as of the program, which handles signals
from gptjax import sweep
from gptjax.sweeps import worker
worker.PROGRAM = (sys.argv.pop(1),)
sweep.script()
'''


@pytest.mark.full
def test_a_sweep_whose_processes_are_killed_ends_as_an_undisturbed_one(tmp_path):
  rng = random.Random(0)
  sweep_of(tmp_path, [], seconds=0.03)
  (tmp_path / 'sweep.py').write_text(
    'from gptjax.sweeps import Sweep, product, seeds, values\ndef get_sweep():\n  return Sweep("configs/default.py", '
    'product(values("optimizer.peak_lr", 1e-3, 2e-3), seeds(6)), metric="loss", overrides={"steps": 20})\n')

  def start(out):
    command = [sys.executable, '-c', SCRIPT, str(tmp_path / 'train.py'), f'--sweep={tmp_path}/sweep.py', f'--out={out}', '--workers=4',
               '--heartbeat=0.5']
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

  assert start(tmp_path / 'calm').wait() == 0
  written = lambda: sum(file.read_text().count('\n') for file in (tmp_path / 'disturbed').glob('trials/*/metrics.jsonl'))
  for kill, lines in enumerate(sorted(rng.sample(range(12 * 20 - 20), 8))):  # of progress, not of time: a machine may be fast or busy
    process = start(tmp_path / 'disturbed')
    while written() <= lines and process.poll() is None:
      time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM if kill % 3 == 2 else signal.SIGKILL)
    process.wait()
  assert start(tmp_path / 'disturbed').wait() == 0
  read = lambda out: [row | {'seconds': ''} for row in csv.DictReader((out / 'trials.csv').open())]
  assert read(tmp_path / 'calm') == read(tmp_path / 'disturbed')
  for folder in (tmp_path / 'calm' / 'trials').iterdir():
    assert (folder / 'metrics.jsonl').read_text() == (tmp_path / 'disturbed' / 'trials' / folder.name / 'metrics.jsonl').read_text()
  best = (tmp_path / 'disturbed' / 'best.py').read_text()
  assert "'optimizer.peak_lr': 0.001" in best and (tmp_path / 'disturbed' / 'report.html').exists()


def test_successive_halving_goes_on_with_the_best(tmp_path):
  rates = np.linspace(1, 9, 27)
  sweep, path = sweep_of(tmp_path, values('optimizer.peak_lr', *rates.tolist()), steps=18, halving=Halving((2, 6), 3))
  queue, order = Queue(sweep, path, tmp_path, 10), []
  while job := queue.next():
    rate = job.trial.point['optimizer.peak_lr']
    (job.folder / 'metrics.jsonl').write_text(json.dumps({'step': job.stop_at or 18, 'loss': rate}) + '\n')
    order.append((round(rate, 3), job.stop_at))
    if job.stop_at:
      add_rung(job.folder, job.stop_at, rate)
    else:
      end_trial(job.folder, 'done', 1.0)
    job.claim.release()
  assert {status_of(queue.folder(trial)).name for trial in queue.trials} == {'done', 'stopped'}
  assert queue.is_over() and len(order) == len(set(order))
  by_stop = {stop: [rate for rate, at in order if at == stop] for stop in (2, 6, 0)}
  assert len(by_stop[2]) == 27 and len(by_stop[6]) >= 9 and by_stop[0][0] == 1.0  # worst last: the best came first
  for trial in queue.trials:  # each choice can be checked by what it saw
    found = json.loads((queue.folder(trial) / 'rungs.json').read_text())
    for seen in found['promoted'].values():
      assert trial.name in sorted(seen, key=lambda name: (seen[name], name))[:len(seen) // 3]
  steps = sum({2: 2, 6: 4, 0: 12}[at] for _, at in order)
  assert steps < 0.4 * 27 * 18


def test_a_trial_that_was_chosen_goes_on_after_its_worker_died(tmp_path):
  sweep, path = sweep_of(tmp_path, values('seed', 0, 1), halving=Halving((2,), 2))
  queue = Queue(sweep, path, tmp_path, 0.05)
  for _ in range(2):
    job = queue.next()
    add_rung(job.folder, 2, float(job.trial.point['seed']))
    job.claim.release()
  job = queue.next()
  assert job.trial.point == {'seed': 0} and job.stop_at == 0 and Queue(sweep, path, tmp_path, 0.05).next() is None
  other = Queue(sweep, path, tmp_path, 0.05)
  assert other.next() is None and not other.is_over()
  time.sleep(0.1)
  again = other.next()
  assert again and again.trial == job.trial and not job.claim.beat()


def table(rate, batch):
  """The loss at a point of a grid of 20 x 10."""
  x, y = (rate - 12) / 5, (batch - 4) / 3
  return 1 + x * x + 0.7 * y * y + 0.5 * x * y + 0.05 * math.sin(9 * x + 4 * y)


@pytest.mark.full
def test_adaptive_points_beat_random_ones_and_are_never_drawn_twice():
  space = {'rate': Choice(*range(20)), 'batch': Choice(*range(10))}
  best = min(table(rate, batch) for rate in range(20) for batch in range(10))
  regret = lambda points: min(table(**point) for point in points) - best
  found = {'adaptive': [], 'random': []}
  for seed in range(12):
    points = []
    for _ in range(32):
      points.append(adaptive_point(Adaptive(32, space, seed), points, {n: table(**point) for n, point in enumerate(points)}))
    assert len({repr(point) for point in points}) == 32
    found['adaptive'].append(regret(points))
    found['random'].append(regret(draws(32, space, seed)))
  assert np.median(found['adaptive']) < np.median(found['random'])


def test_adaptive_points_depend_on_the_known_results_alone(tmp_path, monkeypatch):
  space = {'optimizer.peak_lr': LogUniform(1e-4, 1e-1), 'seed': Choice(0, 1, 2), 'optimizer.schedule': Choice('cosine', 'linear'),
           'optimizer.weight_decay': Uniform(0, 0.3)}
  sweep, path = sweep_of(tmp_path, Adaptive(7, space, seed=3, startup=3), steps=2)
  queue = Queue(sweep, path, tmp_path, 2)
  work(queue, tmp_path, monkeypatch=monkeypatch)
  assert len(queue.trials) == 7 and {status_of(queue.folder(trial)).name for trial in queue.trials} == {'done'}
  files = [json.loads(file.read_text()) for file in sorted((tmp_path / 'draws').iterdir())]
  points = [one['point'] for one in files]
  for number, one in enumerate(files):  # replayed from what each knew
    known = {int(index): value for index, value in one['results'].items()}
    assert adaptive_point(sweep.points, points[:number], known) == one['point']
  assert [trial.name for trial in Queue(sweep, path, tmp_path, 2).trials] == [trial.name for trial in queue.trials]
  changed = Sweep('configs/default.py', Adaptive(9, {'seed': Choice(0, 1)}), metric='loss', overrides={'steps': 2})
  with pytest.raises(UserError, match='points: space: .*another --out'):
    Queue(changed, path, tmp_path, 2).next()


def test_combinations_that_are_wrong_are_not_drawn(tmp_path):
  space = {'model.heads': Choice(1, 3, 5, 7), 'model.width': Choice(30, 42, 70)}
  sweep, path = sweep_of(tmp_path, Adaptive(12, space, startup=3), steps=2)
  queue, drawn = Queue(sweep, path, tmp_path, 2), []
  preview = [trial.name for trial in queue.preview()]
  while job := queue.next():
    (job.folder / 'metrics.jsonl').write_text(json.dumps({'step': 2, 'loss': job.trial.point['model.heads']}) + '\n')
    end_trial(job.folder, 'done', 1.0)
    job.claim.release()
    drawn.append(job.trial.point)
  assert len(preview) == 3 and [trial.name for trial in queue.trials][:3] == preview
  assert sorted((point['model.heads'], point['model.width']) for point in drawn) == [
    (heads, width) for heads in (1, 3, 5, 7) for width in (30, 42, 70) if width % heads == 0]
  impossible = Sweep('configs/default.py', Adaptive(4, {'model.heads': Choice(7, 9)}), overrides={'model.width': 64})
  with pytest.raises(UserError, match='model.heads: .*expected'):
    Queue(impossible, path, tmp_path / 'other', 2).next()


def test_options_that_are_tuples_are_found_again(tmp_path):
  sweep, path = sweep_of(tmp_path, Adaptive(3, {'frozen': Choice(('tokens/*',), ('tokens/*', 'head/*'), ())}), steps=2)
  queue = Queue(sweep, path, tmp_path, 2)
  names = [queue.next().trial.name for _ in range(3)]
  assert len(set(names)) == 3 and [trial.name for trial in Queue(sweep, path, tmp_path, 2).trials] == names


def test_the_end_of_a_log_is_that_of_the_last_attempt(tmp_path, monkeypatch):
  sweep, path = sweep_of(tmp_path, values('seed', 0))
  queue = Queue(sweep, path, tmp_path, 2)
  (folder := queue.folder(queue.trials[0])).mkdir(parents=True)
  (folder / 'log.txt').write_text('of an earlier attempt\n')
  (tmp_path / 'train.py').write_text('import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n')
  lines = work(queue, tmp_path, 1, monkeypatch=monkeypatch)
  assert status_of(folder).error == 'signal SIGKILL: ' and 'earlier' not in ''.join(lines)


def test_places_divide_cores(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {3, 4, 5})
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  monkeypatch.setattr(Path, 'glob', lambda self, pattern: iter(()))
  assert [place.cores for place in places(2)] == [[3, 5], [4]] and [place.cores for place in places(4)][3] == [3]
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,3,6')
  assert [place.environment for place in places(2)] == [{'CUDA_VISIBLE_DEVICES': '2,6'}, {'CUDA_VISIBLE_DEVICES': '3'}]
  with pytest.raises(UserError, match='--workers: 4, expected: at most 3'):
    places(4)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
  assert [place.environment for place in places(2)] == [{}, {}]
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
  monkeypatch.setattr(Path, 'glob', lambda self, pattern: iter(range(4)) if pattern == 'vfio/[0-9]*' else iter(()))
  assert [place.environment['TPU_VISIBLE_CHIPS'] for place in places(4)] == ['0', '1', '2', '3'] and places(1)[0].environment == {}
  with pytest.raises(UserError, match='--workers: 2, expected: 1 or 4'):
    places(2)
