"""The sweep of learning rates by width, its tables, and the coordinate check of muP."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, run_module
from slices import assert_the_page_has_the_tables, needs_the_same_library, rerun

from experiments.learning_rate_transfer import activations, large, sweep
from experiments.learning_rate_transfer.rates import LOSS, MUON, MUP, STANDARD, best, bracketed, described, losses, moves
from experiments.runs import Run, read
from gptjax.config import ComputeConfig, ModelConfig
from gptjax.model import abstract_model
from gptjax.sweeps import make_trials


FOLDER = ROOT / 'experiments/learning_rate_transfer'


@pytest.mark.parametrize('module', [sweep, large])
def test_all_trials_are_made_and_heads_have_one_size(module):
  found = module.get_sweep()
  trials = make_trials(found, found.points, Path('sweep.py'))
  models = [trial.config.model for trial in trials]
  assert len({model.head_width for model in models}) == 1 and len({model.layers for model in models}) == 1
  assert {model.width_ratio for model in models} == {1.0, *(width / module.BASE for width in {model.width for model in models}
                                                              if width > module.BASE)}


def runs_of(optima):
  """Runs whose loss is a parabola over the logarithm of the rate, by way to train and width."""
  runs = []
  for (kind, width), optimum in optima.items():
    for seed in range(2):
      for rate in (0.001, 0.002, 0.004, 0.008, 0.016):
        name = 'optimizer.muon_lr' if kind == MUON else 'optimizer.peak_lr'
        point = {'model.width': str(width), 'model.mup_base': '64' if kind == MUP else '0', name: str(rate),
                 'optimizer.name': 'muon' if kind == MUON else 'adamw'}
        runs.append(Run(point, seed, {LOSS: 2 + np.log2(rate / optimum)**2 / 10 + seed / 10}))
  return runs


def test_the_best_rates_of_known_losses_are_found():
  found = losses(runs_of({(STANDARD, 64): 0.008, (STANDARD, 512): 0.001, (MUP, 512): 0.004, (MUON, 64): 0.002, (MUON, 512): 0.002}))
  assert {kind: moves(one) for kind, one in found.items()} == {STANDARD: 3, MUP: 1, MUON: 0}
  assert found[MUP][64] == found[STANDARD][64] and best(found[MUP][512]) == 0.004
  assert found[MUON][64][0.002][0] == pytest.approx(2.05) and found[MUON][64][0.002][1] == pytest.approx(0.05 * 12.7062, rel=1e-4)
  assert not bracketed(found[STANDARD][512]) and bracketed(found[MUP][512])
  text = described(found)
  assert '| AdamW, standard | 0.008 | 0.001 (at the edge) | 3 | 0.9000 |' in text
  assert '| AdamW, muP | 0.008 | 0.004 | 1 | 0.1000 |' in text


def test_the_tables_are_those_of_the_trials():
  assert_the_page_has_the_tables('learning_rate_transfer')


@pytest.mark.full
@needs_the_same_library
def test_the_slice_finds_the_stated_loss(tmp_path):
  mean, half = losses(read(FOLDER / 'trials.csv'))[MUP][128][0.002]
  found = rerun(sweep.get_sweep(), tmp_path, {'seed': 0, 'model.width': 128, 'model.mup_base': 64, 'optimizer.peak_lr': 0.002})
  assert abs(found[LOSS] - mean) <= half


def test_the_check_reads_what_the_model_computes(one_device):
  model = ModelConfig(layers=2, width=32, heads=2, vocab_size=64, positions='rope', norm='rmsnorm', bias=False, tied=False, mup_base=16)
  described, tokens = abstract_model(model, ComputeConfig(), 8), jnp.arange(16).reshape(2, 8)
  module = described.merge(described.initialize(jax.random.key(0), described.shardings(0, one_device)))
  found, logits = activations.activations(module, tokens), module(tokens)
  assert tuple(found) == activations.NAMES
  np.testing.assert_allclose(found['logits'].reshape(logits.shape), logits, 1e-5, 1e-6)


def test_the_distance_from_the_mean_is_relative():
  assert activations.spread({64: 1.0, 128: 2.0, 256: 3.0}) == pytest.approx(0.5)


@pytest.mark.parametrize('program', ['analyse', 'coordinates'])
def test_a_wrong_picture_is_one_line(program):
  flags = ['--trials=nowhere.csv'] if program == 'analyse' else []
  done = run_module(f'experiments.learning_rate_transfer.{program}', *flags, '--picture=rates.jpg')
  assert done.returncode == 2 and done.stderr == "error: --picture: 'rates.jpg', expected: a file that ends in .png\n"
