"""The experiment batch_size: its sweeps and its averages."""

from pathlib import Path

import numpy as np
import pytest

from experiments.batch_size import large
from experiments.batch_size.report import PARTS, averaged, scale
from experiments.batch_size.sweep import get_sweep, rate
from gptjax.config import duration_in_steps
from gptjax.sweeps import make_trials


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
