"""The experiment parallelism: its layouts, its tables and one layout compiled again."""

import csv
import math
from pathlib import Path

import pytest
from commands import ROOT, run_module

from experiments.parallelism import large, sweep
from experiments.parallelism.sweep import resolved
from gptjax.sweeps import make_trials

FOLDER = ROOT / 'experiments/parallelism'


def analysed(layouts=FOLDER / 'layouts.csv', pod=FOLDER / 'pod.csv'):
  return run_module('experiments.parallelism.analyse', f'--layouts={layouts}', f'--pod={pod}')


@pytest.mark.parametrize('module, devices', [(sweep, 8), (large, 64)], ids=['small', 'large'])
def test_every_layout_has_all_devices_and_one_batch(module, devices):
  found = resolved(module.get_sweep(), module.LAYOUTS)
  assert len(found) == len(module.LAYOUTS) == len(make_trials(module.get_sweep(), module.get_sweep().points, Path('sweep.py')))
  assert {math.prod(config.mesh.sizes.values()) for config in found.values()} == {devices}
  assert len({(config.batch_size, config.microbatches, config.model.layers) for config in found.values()}) == 1
  assert {config.zero_stage for config in found.values()} == {0, 1, 2, 3}


def test_the_tables_are_those_of_the_measurements():
  done = analysed()
  assert done.returncode == 0, done.stderr
  tables, page = done.stdout.strip().split('\n\n'), (FOLDER / 'README.md').read_text()
  assert len(tables) == 4 and all(table in page for table in tables)


@pytest.mark.parametrize('layouts, pod, error', [
  ('layouts.csv', 'layouts.csv', "a column 'bottleneck'"), ('pod.csv', 'pod.csv', "a column 'compiled rest'"),
  ('README.md', 'pod.csv', "a column 'compiled rest'")])
def test_a_mistake_is_one_line(layouts, pod, error):
  done = analysed(FOLDER / layouts, FOLDER / pod)
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and error in done.stderr, done.stderr


def test_an_unknown_layout_is_one_line(tmp_path):
  done = run_module('experiments.parallelism.measure', f'--out={tmp_path}/layouts.csv', '--only=ZeRO 4')
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and "--only: 'ZeRO 4', expected: one of ZeRO 0; " in done.stderr, done.stderr


@pytest.mark.full
def test_the_slice_compiled_again_is_the_committed_row(tmp_path):
  done = run_module('experiments.parallelism.measure', f'--out={tmp_path}/layouts.csv', '--only=ZeRO 3', f'--cache_dir={tmp_path}')
  assert done.returncode == 0, done.stderr
  with (FOLDER / 'layouts.csv').open() as committed, (tmp_path / 'layouts.csv').open() as again:
    expected, = (row for row in csv.DictReader(committed) if row['layout'] == 'ZeRO 3')
    found, = csv.DictReader(again)
  for column, tolerance in (('loss', 1e-6), ('compiled rest', 1e-3)):  # tests compile with fewer optimizations
    assert float(found.pop(column)) == pytest.approx(float(expected.pop(column)), rel=tolerance)
  assert found == expected
