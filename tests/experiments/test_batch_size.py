"""The experiment batch_size: its sweeps, its averages, its tables and one trial again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, run_module
from slices import assert_the_page_has_the_tables, needs_the_same_library, rerun

from experiments.batch_size import large
from experiments.batch_size.report import LOSS, PARTS, at_rule, averaged, scale
from experiments.batch_size.sweep import RATE, get_sweep, rate
from experiments.runs import read
from gptjax.config import duration_in_steps
from gptjax.sweeps import make_trials

FOLDER = ROOT / 'experiments/batch_size'


def analysed(folder):
  return run_module('experiments.batch_size.analyse', f'--trials={folder}/trials.csv')


@pytest.mark.parametrize('sweep', [get_sweep(), large.get_sweep()], ids=['small', 'large'])
def test_all_batch_sizes_train_on_equal_tokens_and_have_parts_to_compare(sweep):
  trials = make_trials(sweep, sweep.points, Path('sweep.py'))
  assert len(trials) == 5 * 3 + 4
  tokens = set()
  for config in (trial.config for trial in trials):
    steps = duration_in_steps('steps', config.steps, batch_size=config.batch_size, context=config.data.context, rows_per_epoch=1)
    tokens.add(steps * config.batch_size * config.data.context)
    assert config.gradient_noise and config.microbatches > 1
  assert max(tokens) < 1.01 * min(tokens)


def test_the_noise_scale_is_the_ratio_of_means():
  lines = np.stack([np.arange(100.0), np.tile([1.0, 3.0], 50), np.tile([10.0, 50.0], 50)], 1)
  found = averaged(lines)
  assert found.shape == (PARTS, 3) and found[-1, 0] == 99 and found[-1, 1] == pytest.approx(2.2)
  assert scale(lines) == 15 and scale(averaged(lines[:80])) == pytest.approx(15)
  assert rate(8, 5e-3, 8) == 5e-3 and rate(32, 5e-3, 8) == 1e-2


def test_the_tables_are_those_of_the_trials():
  assert_the_page_has_the_tables('batch_size')


@pytest.mark.parametrize('text, words', [('trial,tokens\na,1\n', 'noise.csv'), (None, 'noise.csv')])
def test_a_wrong_table_is_reported(tmp_path, text, words):
  shutil.copy(FOLDER / 'trials.csv', tmp_path)
  if text:
    (tmp_path / 'noise.csv').write_text(text)
  done = analysed(tmp_path)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr


@pytest.mark.full
@needs_the_same_library
def test_the_slice_finds_the_stated_loss(tmp_path):
  mean, half = at_rule(read(FOLDER / 'trials.csv')).mean('batch_size=32', LOSS)
  found = rerun(get_sweep(), tmp_path, {'seed': 0, 'batch_size': 32, 'optimizer.peak_lr': rate(32, RATE, 8)})
  assert abs(found[LOSS] - mean) <= half
