"""A class is predicted from the last token of its text alone, in any row, on any mesh; heads and data that do not fit are errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from classified import LABELS, settings, write
from tiny import put, trainer

from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, PipelineConfig, SourceConfig, UserError, override, read_config
from gptjax.data import EvalRows, Mixture, Packed, Recipe, TrainRows, open_source, write_store
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.model import abstract_model
from gptjax.sharding import make_mesh
from gptjax.training import classification

MODEL = ModelConfig(layers=1, width=16, heads=2, vocab_size=259, positions='rope', classes=3)


@pytest.fixture(scope='module')
def store(tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  return write_store(folder / 'store', Recipe(
    open_source(SourceConfig(str(write(folder)), label='label', labels=LABELS)), ByteTokenizer()))


def metrics_of(store, folder, kind, sizes, *, stage=0, microbatches=1, model=MODEL, compute=ComputeConfig(), pipeline=PipelineConfig()):
  """(loss, accuracy, gradient norm, targets) of one step on all texts of a store."""
  layout = Packed(store, 32, kind, folder)
  count = -(-layout.count // 8) * 8
  rows = EvalRows(store, 32, True, folder) if kind == 'pack' else TrainRows([layout], Mixture([layout.count], [1.0]), 32, 0, True)
  with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
    state, step = trainer(model, context=32, zero_stage=stage, microbatches=microbatches, compute=compute, pipeline=pipeline, drawn=False,
                          objective=classification())
    _, metrics = step(state, put(rows.batch(np.arange(count))))
  return [float(metrics[name]) for name in ('loss', 'accuracy', 'grad_norm', 'targets')]


def test_the_step_depends_neither_on_packing_nor_the_mesh(store, tmp_path):
  one = metrics_of(store, tmp_path, 'document', {'data': 1}, microbatches=2)
  assert one[-1] == 48 and 0 < one[1] < 1
  np.testing.assert_allclose(metrics_of(store, tmp_path, 'pack', {'data': 2, 'model': 2, 'context': 2}, stage=3), one, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize('sizes, stage, more', [
  ({'data': 4, 'model': 2}, 1, {'model': dataclasses.replace(MODEL, tied=False)}), ({'data': 4, 'model': 2}, 2, {'microbatches': 2}),
  ({'data': 4, 'model': 2}, 3, {'compute': ComputeConfig(sequence_parallel=True, scan=True)}),
  ({'data': 2, 'pipe': 2, 'model': 2}, 2, {'microbatches': 2}),
  ({'data': 2, 'pipe': 2}, 3, {'microbatches': 4, 'pipeline': PipelineConfig('ZBH1')}),
  ({'data': 8}, 3, {'model': dataclasses.replace(MODEL, width=24, heads=2)})])
def test_the_step_is_equal_in_every_layout(sizes, stage, more, store, tmp_path):
  more = more | {'model': dataclasses.replace(more.get('model', MODEL), layers=2)}
  one = metrics_of(store, tmp_path, 'document', {'data': 1}, model=more['model'])
  np.testing.assert_allclose(metrics_of(store, tmp_path, 'pack', sizes, stage=stage, **more), one, rtol=1e-5)


def test_accuracy_is_that_of_the_last_token_which_does_not_see_the_class(store, tmp_path):
  described = abstract_model(MODEL, ComputeConfig(), 32)
  starts = store.starts(0, store.documents)
  with jax.set_mesh(make_mesh(MeshConfig(data=1))):
    parameters = trainer(MODEL, context=32, drawn=False, objective=classification())[0].parameters
    assert {name for name in parameters if not name.startswith(('blocks/', 'norm/'))} == {'tokens/table', 'classifier/kernel'}
    logits = jax.jit(lambda tokens: described.merge(parameters)(tokens))
    nats, right = [], []
    for start, stop in zip(starts, starts[1:]):
      *ids, label = store.read([start], [stop - start]).tolist()
      scores = np.asarray(logits(np.pad(ids, (0, 32 - len(ids)))[None]), np.float64)[0, len(ids) - 1]
      assert scores.shape == (3,)
      nats.append(np.log(np.exp(scores).sum()) - scores[label])
      right.append(scores.argmax() == label)
  loss, accuracy, *_ = metrics_of(store, tmp_path, 'pack', {'data': 1})
  np.testing.assert_allclose([loss, accuracy], [np.mean(nats), np.mean(right)], rtol=1e-5)


@pytest.mark.parametrize('tied', [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_model_of_tokens_becomes_one_of_classes(tied, tmp_path, cache):
  base = tiny.config(tiny.write_text(tmp_path / 'text.txt'), data__tokenizer__kind='bytes', model__positions='rope', steps=1,
                     model__tied=tied)
  tiny.run(base, tmp_path / 'base', cache)
  path = write(tmp_path)
  tuned = settings(path, init_from=str(tmp_path / 'base'), steps=1, optimizer__peak_lr=0.0, model__tied=tied)
  found = tiny.run(tuned, tmp_path / 'tuned', cache)
  assert 'accuracy' in found[0] and not (tmp_path / 'tuned/samples.jsonl').exists()
  assert read_config(tmp_path / 'tuned').model.classes == 3
  with pytest.raises(UserError, match='^init_from: .*no blocks/1/'):
    tiny.run(override(tuned, {'model.layers': 2}), tmp_path / 'deeper', cache)
  with pytest.raises(UserError, match='^init_from: .*classifier/kernel left out'):
    tiny.run(override(base, {'init_from': str(tmp_path / 'tuned'), 'model.vocab_size': 259}), tmp_path / 'back', cache)


@pytest.mark.full
def test_a_run_resumes_as_if_it_had_not_ended(tmp_path, cache):
  path = write(tmp_path)
  whole = tiny.run(settings(path, steps=8), tmp_path / 'whole', cache)
  tiny.run(settings(path, steps=8), tmp_path / 'parts', cache, stop_at=3)
  assert tiny.run(settings(path, steps=8), tmp_path / 'parts', cache) == whole
  with pytest.raises(UserError, match='^model.classes: 2, expected: 3, with which'):
    (tmp_path / 'texts.jsonl').write_text('\n'.join(json.dumps({'text': f'{i}', 'label': i % 2}) for i in range(48)))
    tiny.run(settings(path, steps=8, data__source__labels=LABELS[:2]), tmp_path / 'parts', cache)


@pytest.mark.parametrize('values, error', [
  ({'model__classes': 2}, '^model.classes: 2, expected: 0, or 3, the number of data.source.labels: bad, good, odd'),
  ({'objective__kind': 'sft'}, '^objective.kind: .*classification for texts with data.source.label'),
  ({'objective__kind': 'classificaton'}, '^objective.kind: .*did you mean classification'),
  ({'data__source__labels': tuple(map(str, range(300)))}, '^data.source.labels: .300 names., expected: at most as many as token ids, 259')])
def test_heads_and_objectives_that_do_not_fit_the_data(values, error, tmp_path, cache):
  with pytest.raises(UserError, match=error):
    tiny.run(settings(write(tmp_path), **values), tmp_path / 'run', cache)


@pytest.mark.parametrize('values, error', [
  ({'objective__kind': 'classification'}, '^objective.kind: .*next_token for documents'),
  ({'model__classes': 2}, '^model.classes: 2, expected: 0')])
def test_documents_have_no_classes(values, error, tmp_path, cache):
  with pytest.raises(UserError, match=error):
    tiny.run(tiny.config(tiny.write_text(tmp_path / 'text.txt'), **values), tmp_path / 'run', cache)
