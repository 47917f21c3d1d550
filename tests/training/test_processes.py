"""Two processes run what one does: the same rows, losses and samples, and a checkpoint that one process reads bit by bit."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from commands import run_module
from tiny import records, write_text

from gptjax.checkpoint import Progress
from gptjax.config import Config
from gptjax.files import read_json
from gptjax.training import run as training_run
from tests.acceptance.kept_state import kept, same

ROOT = pathlib.Path(__file__).parents[2]

CACHE = ROOT / '.jax_cache' / 'processes'
"""Compiled programs are found again only if the path of the cache is the same."""

RECIPE = """
from gptjax.config import *

def get_config():
  return Config(
    model=ModelConfig(layers=1, heads=2, width=16, dropout=0.1),
    data=DataConfig(source=SourceConfig({text!r}), context=16, tokenizer=TokenizerConfig(kind='chars')),
    optimizer=OptimizerConfig(warmup=2, peak_lr=1e-2), eval=EvalConfig(every=0, rows=8, sample_tokens=4),
    checkpoint=CheckpointConfig(every=2), steps=4, batch_size=8, zero_stage=3)
"""


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  folder = tmp_path_factory.mktemp('home')
  (folder / 'recipe.py').write_text(RECIPE.format(text=str(write_text(folder / 'text.txt'))))
  shutil.rmtree(CACHE / 'data', ignore_errors=True)
  return folder


def run(home, module, *flags, processes=2, check=True):
  if processes == 1:
    done = run_module(module, f'--cache_dir={CACHE}', '--cpu_devices=4', *flags)
    assert not check or done.returncode == 0, done.stderr
    return done
  launch = ['tools.launch.local', f'--processes={processes}', '--devices=2', '--', sys.executable, '-m']
  done = subprocess.run([sys.executable, '-m', *launch, module, f'--cache_dir={CACHE}', '--rendezvous_timeout=60', *flags], cwd=ROOT,
                        capture_output=True, text=True, timeout=120, env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})
  assert not check or done.returncode == 0, done.stderr
  return done


def train(home, name, processes=2, *flags, check=True):
  return run(home, 'tests.acceptance.kept_state', f'--config={home}/recipe.py', f'--workdir={home}/{name}', '--log_every=1', *flags,
             processes=processes, check=check)


@pytest.fixture(scope='module')
def one(home):
  """The workdir of a run of one process with four devices."""
  train(home, 'one', 1)
  return home / 'one'


@pytest.fixture(scope='module')
def two(home):
  """The workdir of the same run of two processes with two each, and what they wrote."""
  return home / 'two', train(home, 'two', 2)


def test_two_processes_train_as_one_does(one, two):
  workdir, done = two
  ours, theirs = records(workdir), records(one)
  assert [line['step'] for line in ours] == [1, 2, 3, 4, 4]  # written once
  for mine, other in zip(ours, theirs, strict=True):
    assert mine.keys() == other.keys() and mine.get('tokens') == other.get('tokens')
    np.testing.assert_allclose([*mine.values()], [*other.values()], rtol=1e-5)
  assert records(workdir, 'samples.jsonl') == records(one, 'samples.jsonl')
  assert done.stdout == '' and '[1]' not in done.stderr and 'Gloo' not in done.stderr
  assert read_json(workdir / 'run.json')['processes'].startswith('2, flags, hosts ')
  assert 'data 4 x model 1' in read_json(workdir / 'run.json')['mesh']


def test_one_process_restores_what_two_saved_bit_by_bit(home, two):
  workdir, _ = two
  train(home, 'two', 1)  # nothing is left to do but to restore
  saved, restored = kept(workdir, 'saved-4', 2), kept(workdir, 'restored-4', 1)
  assert len(saved) > 20 and same(saved, restored)
  parts = [np.load(workdir / f'saved-4.{process}.npz') for process in range(2)]
  assert all(len(part) > 5 for part in parts) and not {*parts[0]} & {*parts[1]}  # each had a part of its own, as of ZeRO 3


def test_each_process_hashes_its_own_arrays(two):
  workdir, _ = two
  files = read_json(workdir / 'checkpoints' / '4' / 'manifest.json')['files']
  assert all(sum(size for name, (size, _) in files.items() if f'ocdbt.process_{process}/d/' in name) > 10_000 for process in range(2))
  for process in range(2):
    read = [line.rpartition(' ')[::2] for line in (workdir / f'hashed-2.{process}').read_text().splitlines()]
    assert read and not any(f'ocdbt.process_{1 - process}/' in name for name, _ in read)
    assert sum(int(size) for name, size in read if f'/ocdbt.process_{process}/d/' in name) == 0  # hashed while they were written


@pytest.mark.full
def test_two_processes_score_and_sample_as_one_does(home, one, two):
  workdir, _ = two
  written = run(home, 'gptjax.generate', f'--workdir={workdir}', '--prompt=the ', '--max_tokens=4')
  assert written.stdout.startswith('the ') and len(written.stdout) == len('the ') + 4 + 1 and written.stderr.count('restored') == 1
  scored = run(home, 'gptjax.evaluate', f'--workdir={workdir}')
  score = json.loads(scored.stdout.splitlines()[-1])
  assert scored.stdout.count('"loss"') == 2 and read_json(workdir / 'evaluation.json')['loss'] == score['loss']
  np.testing.assert_allclose(score['loss'], records(one)[-1]['eval/valid/loss'], rtol=1e-5)


@pytest.mark.full
def test_an_error_of_process_0_ends_both_with_one_line_each(home, two):
  workdir, _ = two
  done = train(home, 'two', 2, '--config.seed=1', check=False)
  line = ('seed: 1, expected: 0, with which this workdir was started; another --workdir for another run, or --accept_changes to resume '
          'anyway')
  assert done.returncode == 2
  errors = [text for text in done.stderr.splitlines() if 'error' in text]
  assert sorted(errors) == [f'[1] error: process 0: {line}', f'error: {line}'] and 'Traceback' not in done.stderr


@pytest.mark.full
def test_processes_of_different_configs_do_not_start(home):
  script = home / 'differ.py'
  script.write_text('import os, sys\nown = sys.argv[1:]\nindex = own[-2]\n'
                    'os.execv(sys.executable, [sys.executable, "-m", "gptjax.train", *own, "--config.seed=" + index[-1]])\n')
  launch = [sys.executable, '-m', 'tools.launch.local', '--processes=2', '--devices=1', '--', sys.executable, script]
  done = subprocess.run([*launch, f'--config={home}/recipe.py', f'--workdir={home}/never', f'--cache_dir={CACHE}'], cwd=ROOT,
                        capture_output=True, text=True, timeout=60)
  lines = done.stderr.splitlines()
  assert done.returncode == 2 and len(lines) == 2 and not (home / 'never').exists()
  assert all("error: --config.seed: '1', expected: '0', as process 0 on " in line for line in lines)


def test_processes_on_cpus_wait_for_each_other_once_the_step_is_compiled(monkeypatch):
  events = []

  class Step:
    """A jitted step that tells what is done with it."""

    def lower(self, state, batch):
      return SimpleNamespace(compile=lambda: events.append('compiled'))

    def __call__(self, state, batch):
      events.append('ran')
      return state, {}

  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(training_run, 'all_gather', lambda name, value: events.append('waited'))
  run = Mock(spec=training_run.Run, config=Config(batch_size=4), mesh=None, step=Step())
  bad_steps = Mock(spec=training_run.BadSteps, next_row=lambda row, size: row)
  source = lambda row, state: ({} for _ in range(3))
  steps = training_run.Steps(run, source, bad_steps, Mock(spec=training_run.TrainState), Progress())
  for _ in range(3):
    steps.dispatch()
  assert events == ['compiled', 'waited', 'ran', 'ran', 'ran']


@pytest.mark.full
@pytest.mark.parametrize('kind', ['preference', 'grpo', 'distillation'])
def test_two_processes_fine_tune_and_evaluate_as_one_does(kind, home, one):
  lines = [{'q': ('a', 'the', 'so')[i % 3], 'w': 'cat', 'l': 'dog'} for i in range(80)]
  (home / 'pairs.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  fields = ['--config.data.source.prompt=q', f'--config.data.source.path={home}/pairs.jsonl', '--config.lora.rank=2',
            f'--config.init_from={one}', f'--config.data.tokenizer.path={one}/data/tokenizer', f'--config.objective.kind={kind}',
            '--config.eval.rows=0', '--config.steps=3']
  draws = ['--config.data.source.completion=w', '--config.data.rows=document', '--config.objective.max_tokens=4']
  fields += {
    'preference': ['--config.data.source.chosen=w', '--config.data.source.rejected=l', '--config.data.rows=pack'],
    'grpo': [*draws, '--config.objective.rewards=[{"name": "length"}]', '--config.objective.group=4', '--config.objective.kl=0.1',
             '--config.eval.completions=2'],
    'distillation': [*draws, f'--config.objective.teacher={one}', '--config.objective.own_samples', '--config.objective.temperature=2'],
  }[kind]
  scores = {}
  for processes in (1, 2):
    workdir = home / f'{kind}{processes}'
    run(home, 'gptjax.train', f'--config={home}/recipe.py', f'--workdir={workdir}', '--log_every=1', *fields, processes=processes)
    done = run(home, 'gptjax.evaluate', f'--workdir={workdir}', processes=processes)
    scores[processes] = records(workdir), json.loads(done.stdout.splitlines()[-1])
  for mine, other in zip(*(found[0] for found in scores.values()), strict=True):
    assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
  ours, theirs = (found[1]['sets']['valid'] for found in scores.values())
  assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6) and ours.get('examples', ours['tokens']) > 2
