"""The experiment scaling_law: its sweeps, its prediction, which was made before its run, and one trial again."""

import csv
import json
from pathlib import Path

import pytest
from commands import ROOT
from slices import on_books, rerun

from experiments.runs import interval, told
from experiments.scaling_law import large, predicted, repeated, sweep
from experiments.scaling_law.fit import fit
from experiments.scaling_law.trials import counted, read
from gptjax.config import load, override
from gptjax.sweeps import make_trials

FOLDER = ROOT / 'experiments/scaling_law'
LEAST_STEPS = 700
RECIPE = load(sweep.RECIPE)
PREDICTION = json.loads((FOLDER / 'prediction.json').read_text())


@pytest.mark.parametrize('module, heads', [(sweep, 16), (large, 64), (predicted, 16), (repeated, 16)])
def test_every_trial_resolves_with_heads_of_one_size(module, heads):
  found = module.get_sweep()
  trials = make_trials(found, found.points, Path('sweep.py'))
  assert {trial.config.model.head_width for trial in trials} == {heads}


@pytest.mark.parametrize('module, vocabulary', [(sweep, {}), (large, large.ROWS)])
def test_every_run_costs_its_budget(module, vocabulary):
  expected = [budget for budget, widths in module.BUDGETS.items() for _ in widths]
  recipe = override(load(module.RECIPE), vocabulary)
  assert [counted(override(recipe, point), '')[2] for point in module.get_sweep().points] == pytest.approx(expected, rel=0.005)


def test_the_trials_are_those_of_the_sweep_and_the_predicted_run_is_twice_as_large_as_any():
  runs = read(FOLDER / 'trials.csv', RECIPE, least_steps=LEAST_STEPS)
  points = [point for point in sweep.get_sweep().points if point['steps'] >= LEAST_STEPS]
  assert sorted(runs.compute) == sorted(counted(override(RECIPE, point), '')[2] for point in points) and runs.left_out == 10
  assert PREDICTION['fields'] == predicted.get_sweep().points[0] and 2 < PREDICTION['parameters'] / runs.parameters.max() < 2.5


def test_the_page_has_the_prediction_the_measurement_and_all_runs():
  page = (FOLDER / 'README.md').read_text()
  with (FOLDER / 'predicted.csv').open(newline='') as file:
    measured, = [float(row['eval/valid/loss']) for row in csv.DictReader(file)]
  error = measured / PREDICTION['eval/valid/loss'] - 1
  assert abs(error) < 0.02 and f'{-error:.2%}'.replace('%', ' %') + ' below the prediction' in page
  assert f'| {measured:.4f} |' in page and '| {eval/valid/loss:.4f}, {low:.3f} to {high:.3f} |'.format(**PREDICTION) in page
  with (FOLDER / 'trials.csv').open(newline='') as file:
    assert all(f'| {row["steps"]} | {float(row["eval/valid/loss"]):.4f} |' in page for row in csv.DictReader(file))


@pytest.mark.full
def test_the_prediction_follows_from_the_trials():
  runs = read(FOLDER / 'trials.csv', RECIPE, least_steps=LEAST_STEPS)
  law = fit(runs.parameters, runs.tokens, runs.loss, resamples=40).prediction(PREDICTION['parameters'], PREDICTION['tokens'])[0]
  assert law == pytest.approx(PREDICTION['eval/valid/loss'], abs=1e-4)


@pytest.mark.full
def test_the_slice_finds_the_stated_loss(tmp_path):
  losses = []
  for name in ('trials.csv', 'repeated.csv'):
    with (FOLDER / name).open(newline='') as file:
      losses += [float(row['eval/valid/loss']) for row in csv.DictReader(file) if row['steps'] == '779']
  mean, half = interval(losses)
  assert told((mean, half)) in (FOLDER / 'README.md').read_text() and len(losses) == 3
  found = rerun(on_books(sweep.get_sweep()), tmp_path, {'model.width': 32, 'steps': 779})
  assert abs(found['eval/valid/loss'] - mean) <= half
