"""How devices are arranged changes neither the losses nor the gradient norms of a run."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from tiny import batch, put, trainer

from gptjax.config import MeshConfig, OptimizerConfig
from gptjax.sharding import make_mesh

STEPS = 6
LAYOUTS = [((8, 1), 0), ((8, 1), 3), ((4, 2), 0), ((4, 2), 3)]
"""Meshes (data, model) and ZeRO stages."""


def follow(model, optimizer, devices, zero_stage):
  """Losses and gradient norms of some steps [STEPS, 2], and the share of the state that the first device holds."""
  with jax.set_mesh(make_mesh(MeshConfig(*devices))):
    settings = OptimizerConfig(name=optimizer, peak_lr=1e-2, clip=0.5)
    state, step = trainer(model, settings, zero_stage=zero_stage, microbatches=2, z_loss=1e-3)
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1]
    first = jax.devices()[0]
    held = sum(math.prod(s.data.shape) for leaf in arrays for s in leaf.addressable_shards if s.device == first)
    figures = []
    for seed in range(STEPS):
      state, metrics = step(state, put(batch(16, seed=seed % 2)))
      figures.append([metrics['loss'], metrics['grad_norm']])
    return np.array(figures, np.float64), held / sum(leaf.size for leaf in arrays)


CASES = [('gpt2', 'adamw', 1e-5), ('modern', 'muon', 1e-4)]


@pytest.mark.parametrize('style, optimizer, tolerance', CASES, indirect=['style'])
def test_losses_are_those_of_one_device(style, optimizer, tolerance):
  modern = style.mlp == 'swiglu'
  model = dataclasses.replace(style, dropout=0.1, scan=modern, layers=2 if modern else 1)
  one, held = follow(model, optimizer, (1, 1), 0)
  assert held == 1 and one[0, 0] - one[-2, 0] > 0.2  # it learns
  for devices, zero_stage in LAYOUTS:
    figures, held = follow(model, optimizer, devices, zero_stage)
    np.testing.assert_allclose(figures, one, rtol=tolerance, err_msg=f'{devices}, ZeRO {zero_stage}')
    assert held < 0.25 if zero_stage == 3 else held > 0.5
