"""The experiment modern_block: its sweeps, its tables and one trial again."""

import dataclasses
from pathlib import Path

import pytest
from commands import ROOT, run_module
from slices import assert_the_page_has_the_tables, needs_the_same_library, rerun

from experiments.modern_block import large
from experiments.modern_block.sweep import MODELS, get_sweep
from experiments.runs import Groups, label, read
from gptjax.model import parameter_count
from gptjax.sweeps import make_trials

FOLDER = ROOT / 'experiments/modern_block'


@pytest.mark.parametrize('sweep, width', [(get_sweep(), 64), (large.get_sweep(), 768)])
def test_every_trial_resolves_and_swiglu_has_the_parameters_of_gelu(sweep, width):
  trials = make_trials(sweep, sweep.points, Path('sweep.py'))
  models = {trial.config.model for trial in trials}
  assert len(trials) == 9 * 3 + 4 and len(models) == 9 and {one.width for one in models} == {width}
  counts = {one.mlp: parameter_count(dataclasses.replace(one, vocab_size=259), 128) for one in models if one.bias and one.tied
            and (one.norm, one.positions, one.qk_norm, one.kv_heads) == ('layernorm', 'learned', 'none', 0)}
  assert counts['swiglu'] == pytest.approx(counts['gelu'], rel=0.001)


def test_the_tables_are_those_of_the_trials():
  assert_the_page_has_the_tables('modern_block')


def test_a_table_without_a_model_is_reported(tmp_path):
  lines = (FOLDER / 'trials.csv').read_text().splitlines(keepends=True)
  (tmp_path / 'trials.csv').write_text(''.join(line for line in lines if 'swiglu' not in line))
  done = run_module('experiments.modern_block.analyse', f'--trials={tmp_path}/trials.csv')
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and 'mlp=swiglu' in done.stderr


@pytest.mark.full
@needs_the_same_library
def test_the_slice_finds_the_stated_loss(tmp_path):
  model = MODELS['+ rope']
  mean, half = Groups(read(FOLDER / 'trials.csv')).mean(label(model), 'eval/valid/loss')
  assert abs(rerun(get_sweep(), tmp_path, {'seed': 0} | model)['eval/valid/loss'] - mean) <= half
