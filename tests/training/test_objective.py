"""The objective counts the targets of the complete batch, and its loss is that of the model's logits."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import batch, put

from gptjax.config import ComputeConfig
from gptjax.model import Positions, abstract_model
from gptjax.sharding import BATCH_SPEC, batch_shard_map, batch_psum
from gptjax.training import next_token


@pytest.mark.parametrize('mesh', ['1x1', '4x2'], indirect=True)
@pytest.mark.parametrize('z_loss', [0.0, 0.01])
def test_the_loss_is_that_of_the_models_logits_over_unmasked_targets(z_loss, style, mesh, random_parameters):
  described = abstract_model(dataclasses.replace(style, layers=1), ComputeConfig(), 16)
  rows = batch()
  zero = described.zero(0, mesh)

  def local(entered, rows):
    model, positions = described.merge(zero.weights(entered)), Positions(rows['positions'], rows['segments'])
    found = next_token(z_loss)(model.head, model.hidden(rows['tokens'], positions)[0], rows)
    return batch_psum(found), jax.reshard(model(rows['tokens'], positions), jax.P(None, None, None))

  run = jax.jit(batch_shard_map(local, (zero.in_specs, BATCH_SPEC), (jax.P(), BATCH_SPEC)))
  (total, count, metrics), logits = run(random_parameters(described), put(rows))
  logits = np.asarray(logits, np.float64)[..., :50]
  normalizer = np.log(np.exp(logits).sum(-1))
  losses = normalizer - np.take_along_axis(logits, rows['targets'][..., None], -1)[..., 0]
  assert count == rows['mask'].sum() and 0 < count < rows['mask'].size
  np.testing.assert_allclose(metrics['loss'], (losses * rows['mask']).sum(), rtol=1e-5)
  np.testing.assert_allclose(total, ((losses + z_loss * normalizer**2) * rows['mask']).sum(), rtol=1e-5)
