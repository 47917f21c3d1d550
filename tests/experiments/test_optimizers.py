"""The experiment optimizers: its sweeps, its tables and one trial again."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, run_module
from slices import assert_the_page_has_the_tables, needs_the_same_library, rerun

from experiments.optimizers import large
from experiments.optimizers.report import LOSS, best, reached
from experiments.optimizers.sweep import BEST, RATE, RATES, get_sweep
from experiments.runs import read
from gptjax.sweeps import make_trials

FOLDER = ROOT / 'experiments/optimizers'


def analysed(folder):
  return run_module('experiments.optimizers.analyse', f'--trials={folder}/trials.csv')


@pytest.mark.parametrize('sweep, rates', [(get_sweep(), RATES), (large.get_sweep(), large.RATES)], ids=['small', 'large'])
def test_every_optimizer_has_all_its_rates_and_three_seeds_at_one(sweep, rates):
  settings = [(trial.config.optimizer, trial.config.seed) for trial in make_trials(sweep, sweep.points, Path('sweep.py'))]
  assert len(settings) == sum(map(len, rates.values())) + 2 * len(rates)
  for name, field in RATE.items():
    mine = [(getattr(one, field.partition('.')[2]), seed) for one, seed in settings if one.name == name]
    assert {rate for rate, seed in mine if seed == 0} == {*rates[name]}
    assert len({rate for rate, seed in mine if seed}) == 1


def test_the_tables_are_those_of_the_trials():
  assert_the_page_has_the_tables('optimizers')


def test_the_chosen_rates_are_the_best_of_seed_0():
  for name, field in RATE.items():
    tried = {float(run.point[field]): run.metrics[LOSS] for run in read(FOLDER / 'trials.csv')
             if run.point['optimizer.name'] == name and run.seed == 0}
    assert tried.keys() == {*RATES[name]} and min(tried, key=tried.get) == BEST[name]
    assert min(tried) < BEST[name] < max(tried)


def test_a_loss_is_reached_between_two_validations():
  curve = np.array([[25, 3.0], [50, 2.0], [75, 2.5], [100, 1.0]])
  assert [reached(curve, loss) for loss in (3.5, 2.5, 2.0, 1.5, 0.5)] == [25, 37.5, 50, pytest.approx(75 + 25 * 1.0 / 1.5), np.inf]


@pytest.mark.parametrize('name, text', [('curves.csv', 'trial,step\na,1\n'), ('cost.csv', 'optimizer,milliseconds\nadamw,fast\n')])
def test_a_wrong_table_is_reported(tmp_path, name, text):
  for one in ('trials.csv', 'curves.csv', 'cost.csv'):
    shutil.copy(FOLDER / one, tmp_path)
  (tmp_path / name).write_text(text)
  done = analysed(tmp_path)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and name in done.stderr


@pytest.mark.full
@needs_the_same_library
def test_the_slice_finds_the_stated_loss(tmp_path):
  mean, half = best(read(FOLDER / 'trials.csv')).mean('name=muon', LOSS)
  found = rerun(get_sweep(), tmp_path, {'seed': 0, 'optimizer.name': 'muon', 'optimizer.muon_lr': BEST['muon']})
  assert abs(found[LOSS] - mean) <= half
