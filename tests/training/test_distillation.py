"""A model learns the probabilities of a teacher: they are those of its logits on every mesh, and runs resume bit by bit."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiers import full
from tiny import config, options, run, write_text

from gptjax import config as configs
from gptjax.checkpoint import Contents, load_trained
from gptjax.config import UserError
from gptjax.data import prepare
from gptjax.model import positions_of
from gptjax.sharding import make_mesh
from gptjax.training import resolve, train
from gptjax.training.workdir import initial_state


@pytest.fixture(scope='module')
def teacher(cache):
  """The config and workdir of a run on digits, the teacher."""
  lines = [{'q': f'{i % 10}{i // 10 % 10}=', 'a': f'{(i + i // 10) % 10}'} for i in range(100)]
  (cache / 'digits.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  settings = config(cache / 'digits.jsonl', objective__kind='sft', data__source__prompt='q', data__source__completion='a',
                    data__rows='document', steps=6, eval__every=0, data__context=16, batch_size=16, model__tied=False)
  run(settings, cache / 'teacher', cache)
  return settings, cache / 'teacher'


def student(teacher, **changes):
  settings, workdir = teacher
  return configs.override(settings, {
    'objective.kind': 'distillation', 'objective.teacher': str(workdir), 'data.tokenizer.path': str(workdir / 'data' / 'tokenizer'),
    'model.width': 32, 'model.tied': True, 'steps': 4, 'checkpoint.every': 2, **{name.replace('__', '.'): value
                                                                              for name, value in changes.items()}})


def logits(model, parameters, batch):
  compute = jax.jit(lambda parameters, batch: model.merge(parameters)(batch['tokens'], positions_of(batch)))
  return np.asarray(compute(parameters, batch), np.float64)


@pytest.mark.parametrize('loss, temperature, layout', [
  ('forward_kl', 1.0, {'mesh.data': 2, 'mesh.context': 2, 'mesh.model': 2, 'zero_stage': 3, 'microbatches': 2}),
  full('reverse_kl', 2.0, {})])
def test_the_divergence_is_that_of_the_logits_of_both_models(loss, temperature, layout, teacher, cache, tmp_path):
  settings = student(teacher, objective__loss=loss, objective__temperature=temperature, steps=1, optimizer__warmup=0)
  found = run(configs.override(settings, layout), tmp_path / 'run', cache)[0]
  mesh = make_mesh(settings.mesh)
  with jax.set_mesh(mesh):
    data = prepare(settings.data, cache)
    new = resolve(settings, data, mesh)
    batch = new.rows.batch(np.arange(16))
    state = initial_state(new, data.tokenizer)[0]
    ours = logits(new.model, state.parameters, batch)
  trained = load_trained(teacher[1])
  with jax.set_mesh(trained.mesh):
    theirs = logits(trained.model, trained.parameters, batch)
  probabilities = lambda logits: np.exp(logits - logits.max(-1, keepdims=True)) / np.exp(logits - logits.max(-1, keepdims=True)).sum(
    -1, keepdims=True)
  ids = slice(data.tokenizer.vocab_size)
  p, q = (probabilities(values[..., ids] / temperature) for values in (theirs, ours))
  p, q = (q, p) if loss == 'reverse_kl' else (p, q)
  mean = lambda values: (values * batch['mask']).sum() / batch['mask'].sum()
  assert found['kl'] == pytest.approx(mean((p * np.log(p / q)).sum(-1)), rel=1e-5)
  entropy = -np.log(np.take_along_axis(probabilities(ours[..., ids]), batch['targets'][..., None], -1))[..., 0]
  assert found['loss'] == pytest.approx(mean(entropy), rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize('changes', [
  {'mesh__data': 2, 'mesh__context': 2, 'mesh__model': 2, 'zero_stage': 3, 'microbatches': 2}, {'microbatches': 4},
  {'mesh__data': 2, 'mesh__pipe': 2, 'microbatches': 2},
  {'mesh__data': 1, 'mesh__pipe': 4, 'mesh__context': 2, 'microbatches': 8, 'pipeline__schedule': 'ZBH1', 'zero_stage': 1},
  {'mesh__data': 1, 'mesh__expert': 2, 'mesh__pipe': 2, 'mesh__context': 2, 'microbatches': 4, 'model__experts': 4}])
def test_the_run_depends_neither_on_the_mesh_nor_on_microbatches(changes, teacher, cache, tmp_path):
  both = {'model__layers': 4, 'data__rows': 'pack', 'batch_size': 8}
  both |= {name: value for name, value in changes.items() if name.startswith('model')}
  settings = student(teacher, **both)
  key = f'one{len(both)}'
  if not (cache / key).exists():
    run(settings, cache / key, cache)
  one = [json.loads(line) for line in (cache / key / 'metrics.jsonl').read_text().splitlines()]
  found = run(student(teacher, **(both | changes)), tmp_path / 'run', cache)
  compared = lambda lines: [line[name] for line in lines for name in ('loss', 'kl', 'grad_norm') if name in line]
  # Divergences of some thousandths are differences of logarithms near 1, which float32 rounds by 1e-7.
  assert compared(found) == pytest.approx(compared(one), rel=1e-5, abs=1e-7) and len(compared(found)) == 12


@pytest.mark.parametrize('changes', [
  {'init_from': True}, full({'init_from': True, 'objective__loss': 'reverse_kl', 'lora__rank': 2})])
def test_a_copy_of_the_teacher_has_nothing_to_learn(changes, teacher, cache, tmp_path):
  changes = changes | {'init_from': str(teacher[1]), 'model__width': 16, 'model__tied': False}
  found = run(student(teacher, **changes), tmp_path / 'run', cache)
  assert abs(found[0]['kl']) < 1e-6 and found[0]['grad_norm'] < 1e-5
  assert (tmp_path / 'run' / 'teacher' / 'config.json').exists()


@pytest.mark.full
def test_it_learns_from_its_own_samples_and_goes_on_bit_by_bit(teacher, cache, tmp_path):
  shutil.copytree(teacher[1], tmp_path / 'teacher')
  settings = student(teacher, objective__own_samples=True, objective__loss='reverse_kl', objective__max_tokens=3, steps=30,
                     objective__teacher=str(tmp_path / 'teacher'), checkpoint__every=3, optimizer__warmup=2)
  found = run(settings, tmp_path / 'run', cache)
  steps = [line for line in found if 'kl' in line]
  assert all(0 <= line['truncated'] <= 1 for line in steps)
  assert sum(line['kl'] for line in steps[-5:]) < 0.5 * sum(line['kl'] for line in steps[:5])
  run(settings, tmp_path / 'again', cache, stop_at=21)
  shutil.rmtree(tmp_path / 'teacher')  # the workdir has a copy
  assert run(settings, tmp_path / 'again', cache) == found
  one, other = (Contents(tmp_path / name / 'checkpoints' / '30') for name in ('run', 'again'))
  for (name, a), (_, b) in zip(one.read([*one.shapes]), other.read([*other.shapes]), strict=True):
    assert np.array_equal(a, b), name


@pytest.mark.parametrize('changes, words', [
  ({'objective__teacher': ''}, "objective.teacher: '', expected: the run or imported model to learn from"),
  ({'objective__teacher': 'nowhere'}, "objective.teacher: '.*nowhere', expected: a folder that gptjax.train or tools.import_hf made"),
  ({'data__tokenizer__path': '', 'data__tokenizer__kind': 'bytes'},
   'objective.teacher: .*expected: a model with the vocabulary of this run; its own is in data.tokenizer.path='),
  ({'data__context': 32}, 'objective.teacher: .*learned positions up to data.context=32; it has 16'),
  ({'mesh__model': 4, 'model__heads': 4}, 'mesh.model: 4, expected: a divisor of the 2 heads of objective.teacher too'),
  ({'objective__loss': 'dpo'}, "objective.loss: 'dpo', expected: forward_kl, reverse_kl"),
  ({'objective__max_tokens': 3}, 'objective.max_tokens: 3, expected: its default unless the model draws completions'),
  ({'objective__own_samples': True, 'objective__max_tokens': 3, 'data__rows': 'pack'}, 'document with objective.own_samples'),
  ({'objective__own_samples': True, 'objective__max_tokens': 3, 'data__source__prompt': '', 'data__source__completion': '',
    'data__source__text': 'q'}, 'objective.kind: .distillation., expected: next_token for documents; distillation is for'),
  ({'objective__kind': 'sft'}, 'objective.teacher: .*expected: its default unless objective.kind is distillation'),
  ({'z_loss': 0.1}, 'z_loss: 0.1, expected: 0 with objective.kind=distillation')])
def test_mistakes(changes, words, teacher, cache, tmp_path):
  with pytest.raises(UserError, match=words):
    train(student(teacher, **changes), options(tmp_path / 'run', cache))
  assert not (tmp_path / 'run').exists()


def test_a_run_keeps_its_teacher(teacher, cache, tmp_path):
  alike = {'model__width': 16, 'model__tied': False}
  run(student(teacher, **alike), tmp_path / 'run', cache, stop_at=2)
  shutil.copytree(teacher[1], tmp_path / 'other')
  with pytest.raises(UserError, match='objective.teacher: .*with which this workdir was started'):
    train(student(teacher, objective__teacher=str(tmp_path / 'other'), **alike), options(tmp_path / 'run', cache, accept_changes=True))
  # The teacher's own run has none.
  with pytest.raises(UserError, match="objective.teacher: .*expected: '', with which this workdir was started"):
    train(student(teacher, steps=9, **alike), options(tmp_path / 'other', cache, accept_changes=True))


@pytest.mark.full
def test_documents_can_be_distilled_too(cache, tmp_path):
  settings = config(write_text(tmp_path / 'text.txt'))
  run(settings, tmp_path / 'teacher', cache)
  taught = configs.override(settings, {'objective.kind': 'distillation', 'objective.teacher': str(tmp_path / 'teacher'), 'model.width': 8,
                                       'data.tokenizer.path': str(tmp_path / 'teacher' / 'data' / 'tokenizer')})
  found = run(taught, tmp_path / 'run', cache)
  assert [line['kl'] > 0 for line in found if 'kl' in line] == [True] * 8 and 'eval/valid/loss' in found[-1]
