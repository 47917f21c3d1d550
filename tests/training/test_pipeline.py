"""Pipeline stages give one device's losses and gradients, whatever the schedule."""

import dataclasses

import jax
import pytest

from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, PipelineConfig
from gptjax.sharding import make_mesh
from tiny import batch, put, trainer

MODEL = ModelConfig(layers=4, width=16, heads=4, kv_heads=2, vocab_size=50, dropout=0.1)


def losses(mesh, pipeline=PipelineConfig(), model=MODEL, steps=2, **values):
  with jax.set_mesh(make_mesh(mesh)):
    state, step = trainer(model, pipeline=pipeline, **values)
    found = []
    for seed in range(steps):
      state, metrics = step(state, put(batch(8, seed=seed)))
      found.append((float(metrics['loss']), float(metrics['grad_norm'])))
    return found


@pytest.mark.parametrize('schedule, chunks, microbatches', [('1F1B', 1, 4), ('GPipe', 1, 4), ('ZBH1', 1, 4), ('Interleaved1F1B', 2, 4)])
def test_losses_are_those_of_one_device(schedule, chunks, microbatches):
  expected = losses(MeshConfig(data=1), microbatches=microbatches)
  found = losses(MeshConfig(data=1, pipe=2), PipelineConfig(schedule, chunks), microbatches=microbatches)
  for (loss, norm), (other, other_norm) in zip(expected, found, strict=True):
    assert other == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(norm, rel=1e-4)
