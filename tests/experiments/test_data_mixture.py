"""The experiment data_mixture: its sweeps, its tables, its samples of text and two trials again."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
from commands import ROOT, run_module
from slices import assert_the_page_has_the_tables, needs_the_same_library, rerun
from small_stores import make_store

from experiments.data_mixture import large
from experiments.data_mixture.sweep import STORES, get_sweep, mixture, pieces, repeated, sweep
from experiments.runs import interval, read
from gptjax.sweeps import make_trials

FOLDER = ROOT / 'experiments/data_mixture'
BOOKS = Path(os.environ.get('GPTJAX_DATA', ROOT / 'data')) / 'books'


@pytest.mark.parametrize('found', [get_sweep(), large.get_sweep()])
def test_every_trial_resolves(found):
  trials = make_trials(found, found.points, Path('sweep.py'))
  assert len(trials) == 30 and all([one.name for one in trial.config.data.valid] == ['code', 'books'] for trial in trials)


def test_the_tables_are_those_of_the_trials():
  assert_the_page_has_the_tables('data_mixture')


def test_another_mixture_is_reported(tmp_path):
  (tmp_path / 'trials.csv').write_text((FOLDER / 'trials.csv').read_text().replace("'weight': 0.25", "'weight': 0.3"))
  done = run_module('experiments.data_mixture.analyse', f'--trials={tmp_path}/trials.csv')
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and 'expected: a mixture of the small sweep' in done.stderr


def test_more_passes_see_the_beginning_of_the_same_sample(tmp_path):
  assert [*pieces('a' * 511 + 'b' * 510 + 'é' + 'c' * 600)] == ['a' * 511, 'c' * 511]
  make_store(tmp_path / 'code', [512 * 1000], vocab_size=259, draw=lambda count: [65 + number // 511 % 26 for number in range(count)])
  done = run_module('experiments.data_mixture.pieces', f'--store={tmp_path}/code', f'--out={tmp_path}')
  assert done.returncode == 0, done.stderr
  texts = {name: [json.loads(line)['text'] for line in (tmp_path / f'code_{name}.jsonl').read_text().splitlines()]
           for name in ('1_0', '4_0', '1_1')}
  assert len(texts['1_0']) * 512 == 400 * 8 * 128 and texts['4_0'] == texts['1_0'][:200] and texts['1_1'] != texts['1_0']


def test_a_store_that_is_too_small_is_reported(tmp_path):
  make_store(tmp_path / 'code', [5000], vocab_size=259, draw=lambda count: [65] * count)
  done = run_module('experiments.data_mixture.pieces', f'--store={tmp_path}/code', f'--out={tmp_path}')
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and '409,600 tokens or more' in done.stderr


def prepare(folder, name, *arguments):
  done = run_module('tools.prepare_data', '--tokenizer=bytes', *arguments, f'--out={folder}/{name}')
  assert done.returncode == 0, done.stderr


def stated(*mixtures):
  """The interval of bits per byte of code over the runs with these values of data.train."""
  texts = [str(one) for one in mixtures]
  return interval(run.metrics['eval/code/loss'] / math.log(2) for run in read(FOLDER / 'trials.csv') if run.point['data.train'] in texts)


@pytest.mark.full
@needs_the_same_library
def test_the_slice_of_repeats_finds_the_stated_bits(tmp_path):
  for side, name in (('train', 'code'), ('valid', 'code_valid')):
    prepare(tmp_path, name, f'--side={side}', '--valid_fraction=0.016')
  done = run_module('experiments.data_mixture.pieces', f'--store={tmp_path}/code', f'--out={tmp_path}')
  assert done.returncode == 0, done.stderr
  prepare(tmp_path, 'code_16_0', f'--source={tmp_path}/code_16_0.jsonl')
  full = sweep(str(tmp_path))
  code = dataclasses.replace(full, metric='eval/code/loss', overrides={'data.valid': full.overrides['data.valid'][:1]})
  found = rerun(code, tmp_path, {'seed': 0, 'data.train': repeated(str(tmp_path), 16, 0)})
  mean, half = stated(*(repeated(STORES, 16, seed) for seed in range(3)))
  assert abs(found['eval/code/loss'] / math.log(2) - mean) <= half


@pytest.mark.full
@needs_the_same_library
@pytest.mark.skipif(not BOOKS.is_dir(), reason=f'there are no books in {BOOKS}; GPTJAX_DATA names the folder of data')
def test_the_slice_of_shares_finds_the_stated_bits(tmp_path):
  for side, name in (('train', 'code'), ('valid', 'code_valid')):
    prepare(tmp_path, name, f'--side={side}', '--valid_fraction=0.016')
  prepare(tmp_path, 'books', f'--source={BOOKS}/train')
  prepare(tmp_path, 'books_valid', f'--source={BOOKS}/valid/[ip]*.txt')
  found = rerun(sweep(str(tmp_path)), tmp_path, {'seed': 0, 'data.train': mixture(str(tmp_path), 0.5)})
  mean, half = stated(mixture(STORES, 0.5))
  assert abs(found['eval/code/loss'] / math.log(2) - mean) <= half
