"""The objective counts the targets of the complete batch, and its loss is that of the model's logits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny import batch, put, trainer

from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, SourceConfig
from gptjax.data import EvalRows, Mixture, Packed, Recipe, TrainRows, open_source, write_store
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.model import Positions, abstract_model
from gptjax.sharding import BATCH_SPEC, batch_psum, batch_shard_map, make_mesh
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
  (total, count, metrics, _), logits = run(random_parameters(described), put(rows))
  logits = np.asarray(logits, np.float64)[..., :50]
  normalizer = np.log(np.exp(logits).sum(-1))
  losses = normalizer - np.take_along_axis(logits, rows['targets'][..., None], -1)[..., 0]
  assert count == rows['mask'].sum() and 0 < count < rows['mask'].size
  np.testing.assert_allclose(metrics['loss'], (losses * rows['mask']).sum(), rtol=1e-5)
  np.testing.assert_allclose(total, ((losses + z_loss * normalizer**2) * rows['mask']).sum(), rtol=1e-5)


def test_the_step_of_examples_depends_neither_on_packing_nor_microbatches_nor_the_mesh(tmp_path):
  (tmp_path / 'a.jsonl').write_text('\n'.join(json.dumps({'q': f'{i} ' * (i % 5), 'a': f'{i}!'}) for i in range(48)))
  source = open_source(SourceConfig(str(tmp_path / 'a.jsonl'), prompt='q', completion='a'))
  store = write_store(tmp_path / 'store', Recipe(source, ByteTokenizer()))
  model = ModelConfig(layers=1, width=16, heads=2, vocab_size=259, positions='rope')
  found = {}
  for kind, microbatches, sizes, stage in (('document', 4, {'data': 1}, 0),
                                           ('pack', 1, {'data': 2, 'model': 2, 'context': 2}, 3)):
    rows = EvalRows(store, 32, True, tmp_path) if kind == 'pack' else TrainRows(
      [layout := Packed(store, 32, kind, tmp_path)], Mixture([layout.count], [1.0]), 32, 0, True)
    count = 48 if kind == 'document' else -(-rows.count // 8) * 8  # the rest is padding
    mesh = make_mesh(MeshConfig(**sizes))
    with jax.set_mesh(mesh):
      state, step = trainer(model, context=32, zero_stage=stage, microbatches=microbatches)
      _, metrics = step(state, put(rows.batch(np.arange(count))))
    found[kind, microbatches, str(sizes)] = [float(metrics[name]) for name in ('loss', 'grad_norm')]
  one, *others = found.values()
  for other in others:
    np.testing.assert_allclose(other, one, rtol=1e-5)
