"""Figures of classifiers are those of the classes that texts have and get, one by one, and so are those of the baselines."""

import collections
import json
import math

import jax
import numpy as np
import pytest
import tiny
from classified import LABELS, settings, write
from commands import run_module

from gptjax.checkpoint import load_trained
from gptjax.config import SourceConfig, UserError
from gptjax.data import EvalRows, NaiveBayes, Recipe, classified_texts, open_held_out, open_source, write_store
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.evaluation import Scorer, class_baselines, class_table, draw_confusion, pooled, record
from gptjax.evaluation.classes import class_figures
from gptjax.inference import Classifier, Generator
from gptjax.training import make_objective


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp('classified')
  tiny.run(settings(write(folder), steps=4), folder / 'run', folder / 'cache')
  return load_trained(folder / 'run'), open_held_out(folder / 'run/data'), folder


def test_the_confusion_matrix_counts_each_text_by_its_own_prediction(trained):
  run, held_out, folder = trained
  store = write_store(folder / 'all', Recipe(open_source(run.config.data.source), held_out.tokenizer))
  texts, labels = zip(*classified_texts(store, held_out.tokenizer), strict=True)
  with jax.set_mesh(run.mesh):
    score = Scorer(run.model, make_objective(run.config), run.mesh, 4)(run.parameters, EvalRows(store, 32, True, folder))
    classifier = Classifier(run.model, run.mesh, held_out.tokenizer, batch_tokens=64)
    probabilities = classifier(run.parameters, list(map(classifier.ids, texts)))
    with pytest.raises(UserError, match="^--text: ' ', expected: a text to classify"):
      classifier.ids(' ', '--text')
    with pytest.raises(UserError, match='^model.classes: 3, expected: 0 to generate'):
      Generator(run.model, run.mesh, held_out.tokenizer)
  counts = collections.Counter(zip(labels, probabilities.argmax(1).tolist(), strict=True))
  assert score.confusion == tuple(tuple(counts[row, column] for column in range(3)) for row in range(3)) and score.tokens == 48
  np.testing.assert_allclose(score.loss, -np.log(probabilities[np.arange(48), labels]).mean(), rtol=1e-5)
  np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
  assert np.sum(pooled([score, score]).confusion) == 96 and score.logged['accuracy'] == np.mean(probabilities.argmax(1) == labels)
  assert held_out.labels == LABELS and sum(NaiveBayes.load(folder / 'run/data').texts) == 48 - held_out.valid['valid'].documents


def test_figures_of_a_matrix():
  found = class_figures(((3, 1, 0), (2, 4, 0), (0, 0, 0)), 'abc')
  assert found['texts'] == 10 and found['accuracy'] == 0.7 and found['confusion'][1] == [2, 4, 0]
  assert found['f1'] == pytest.approx({'a': 2 * 3 / (4 + 5), 'b': 2 * 4 / (6 + 5), 'c': 0.0})
  assert found['macro_f1'] == pytest.approx((6 / 9 + 8 / 11) / 3)


def test_naive_bayes_by_hand(tmp_path):
  # The example of Manning et al. 2008, table 13.1, whose words are Chinese, Beijing, Shanghai, Macao, Tokyo and Japan.
  texts = [('Chinese Beijing, Chinese', 1), ('Chinese chinese Shanghai', 1), ('Chinese Macao', 1), ('Tokyo Japan Chinese', 0)]
  bayes = NaiveBayes.fit(texts, 2)
  assert bayes.texts == [1, 3] and bayes.words['chinese'] == [1, 5] and bayes.majority == 1
  classes, words = bayes._scores
  np.testing.assert_allclose(np.exp(classes), [1 / 4, 3 / 4])
  np.testing.assert_allclose(np.exp(words['chinese']), [2 / 9, 6 / 14])
  np.testing.assert_allclose(np.exp(words['tokyo']), [2 / 9, 1 / 14])
  assert bayes.predict(['Chinese Chinese Chinese Tokyo Japan', 'Tokyo JAPAN', 'unknown', '']).tolist() == [1, 0, 1, 1]
  bayes.save(tmp_path)
  assert NaiveBayes.load(tmp_path) == bayes
  (tmp_path / 'words.json').write_text('{"texts": [1]}')
  with pytest.raises(UserError, match='words.json: .*restore it'):
    NaiveBayes.load(tmp_path)


@pytest.mark.full
def test_naive_bayes_is_that_of_scikit_learn():
  text, naive_bayes = pytest.importorskip('sklearn.feature_extraction.text'), pytest.importorskip('sklearn.naive_bayes')
  metrics = pytest.importorskip('sklearn.metrics')
  rng = np.random.default_rng(0)
  texts = [' '.join(f'W{number}' for number in rng.zipf(1.5, rng.integers(1, 9)) % 50) for _ in range(300)]
  labels = rng.integers(0, 3, 300)
  counter = text.CountVectorizer(token_pattern=r'\w+')
  theirs = naive_bayes.MultinomialNB().fit(counter.fit_transform(texts[:200]), labels[:200]).predict(counter.transform(texts[200:]))
  ours = NaiveBayes.fit(zip(texts[:200], labels[:200].tolist(), strict=True), 3).predict(texts[200:])
  assert ours.tolist() == theirs.tolist()
  figures = class_figures(metrics.confusion_matrix(labels[200:], ours), 'abc')
  np.testing.assert_allclose([*figures['f1'].values()], metrics.f1_score(labels[200:], ours, average=None))
  assert math.isclose(figures['accuracy'], metrics.accuracy_score(labels[200:], ours))


def test_baselines_stand_beside_each_figure(tmp_path):
  path = write(tmp_path)
  store = write_store(tmp_path / 'store', Recipe(open_source(SourceConfig(str(path), label='label', labels=LABELS)), ByteTokenizer()))
  bayes = NaiveBayes.fit([('word', 2), ('word', 2), ('x', 1)], 3)
  found = class_baselines(bayes, {'a': store, 'b': store}, {'a': ['a'], 'all': ['a', 'b']}, ByteTokenizer(), 0)
  assert found['majority class']['a']['confusion'] == [[0, 0, 16]] * 3 and found['majority class']['all']['texts'] == 96
  longest = 9  # tokens
  kept = [len(text) + 2 for text, _ in classified_texts(store, ByteTokenizer())]
  short = class_baselines(bayes, {'a': store}, {'a': ['a']}, ByteTokenizer(), longest)
  assert short['naive Bayes']['a']['texts'] == sum(length <= longest for length in kept) < 48
  ours = {'a': class_figures(((16, 0, 0), (1, 15, 0), (0, 0, 16)), LABELS) | {'loss': 0.25}}
  lines = class_table(7, ours, found).splitlines()
  assert lines[1].split() == ['7', 'a', 'accuracy', '0.9792', '0.3333', '0.3333'] and [line.split()[3] for line in lines[3:6]] == [*LABELS]
  assert lines[6].startswith('a: 48 texts, loss 0.2500') and lines[-2].split() == ['good', '1', '15', '0']
  draw_confusion(ours, tmp_path / 'a.png')
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.full
def test_commands_need_the_workdir_alone(trained):
  _, held_out, folder = trained
  call = lambda module, *flags: run_module(f'gptjax.{module}', f'--workdir={folder}/run', f'--cache_dir={folder}/cache', *flags)
  written = [json.loads(line) for line in (folder / 'run/metrics.jsonl').read_text().splitlines()][-1]
  (folder / 'texts.jsonl').rename(folder / 'moved.jsonl')
  done = call('evaluate', f'--sets=valid,test={folder}/moved.jsonl')
  assert done.returncode == 0, done.stderr
  printed, kept = json.loads(done.stdout.splitlines()[-1]), json.loads((folder / 'run/evaluation.json').read_text())
  assert printed['sets']['valid']['accuracy'] == pytest.approx(written['eval/valid/accuracy']) and printed['sets']['test']['texts'] == 48
  assert {*kept['class_baselines']} == {'majority class', 'naive Bayes'} and kept['class_baselines']['naive Bayes']['test']['texts'] == 48
  assert (folder / 'run/confusion.png').exists() and 'macro F1' in done.stdout
  assert {*record(1, None, None, held_out.labels)} == {'step'}
  for name, text in (('lines.txt', 'word1\n\nword word2\n'), ('lines.jsonl', '{"text": "word1"}\n{"text": "word word2"}\n')):
    (folder / name).write_text(text)
    found = [json.loads(line) for line in call('classify', f'--texts={folder}/{name}').stdout.splitlines()]
    assert [one['text'] for one in found] == ['word1', 'word word2']
    assert all(one['label'] == max(one['probabilities'], key=one['probabilities'].get) for one in found)
  one = call('classify', '--text=word1').stdout.split()
  assert sorted(one[::2]) == sorted(LABELS) and float(one[1]) == pytest.approx(max(found[0]['probabilities'].values()), abs=1e-4)
  for flags in ((), ('--text=a', '--texts=b'), ('--texts=none.txt',), ('--text= ',)):
    done = call('classify', *flags)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('error: '), done.stderr
  done = call('generate', '--prompt=a')
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith('error: model.classes: 3')
  other = write_store(folder / 'other', Recipe(open_source(SourceConfig(
    f'{folder}/moved.jsonl', label='label', labels=LABELS[::-1])), ByteTokenizer()))
  done = call('evaluate', f'--sets=a={other.location}')
  assert done.returncode == 2 and "with the run's classes, bad, good, odd, not odd, good, bad" in done.stderr
