"""One trial of an experiment, run again."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from commands import ROOT, run_module

from gptjax.config import to_json
from gptjax.sweeps import make_trials

needs_the_same_library = pytest.mark.skipif(
  sys.version_info[:2] != (3, 11), reason='the experiments were measured on the standard library of Python 3.11, which is their data')


def on_books(sweep):
  """A Sweep over books, with those of the folder GPTJAX_DATA, or of data/ in this repository; skips the test where there are none."""
  folder = Path(os.environ.get('GPTJAX_DATA') or ROOT / 'data', 'books/train')
  if not folder.is_dir():
    pytest.skip(f'books are no part of the repository, and {folder} is not there: GPTJAX_DATA names a folder that has books/train/*.txt')
  return dataclasses.replace(sweep, overrides={**sweep.overrides, 'data.source.path': str(folder)})


def rerun(sweep, folder, point):
  """The last of every metric of the trial of a Sweep at a point, such as {'seed': 0, 'optimizer.peak_lr': 0.002}."""
  points = [one for one in sweep.points if point.items() <= one.items()]
  assert len(points) == 1, f'{point} is in {len(points)} points'
  trial, = make_trials(sweep, points, Path('sweep.py'))
  (folder / 'config.json').write_text(to_json(trial.config))
  done = run_module('gptjax.train', f'--config={folder}/config.json', f'--workdir={folder}/{trial.name}', '--cpu_devices=1')
  assert done.returncode == 0, done.stderr
  found = {}
  for line in (folder / trial.name / 'metrics.jsonl').read_text().splitlines():
    found |= json.loads(line)
  return found


def assert_the_page_has_the_tables(name):
  """The README of an experiment shows the tables that its analysis makes of its trials."""
  folder = ROOT / 'experiments' / name
  done = run_module(f'experiments.{name}.analyse', f'--trials={folder}/trials.csv')
  assert done.returncode == 0, done.stderr
  page, tables = (folder / 'README.md').read_text(), done.stdout.strip().split('\n\n')
  assert tables[0] and all(table in page for table in tables)
