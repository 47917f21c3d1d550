"""Bars of classification: spam, as many messages of one class as of the other, from random weights and from a base model."""

import json
import resource
import statistics
from pathlib import Path

from tests.acceptance.record import Result, bar, given, python, train

SPLITS = range(5)


@bar
def spam_from_scratch(folder: Path) -> Result:
  ours, bayes = _accuracies(folder, 'spam')
  return Result('spam, 747 messages of each class, 70 % to train on and 20 % to test on, random weights, 5 seeds of split and run: mean '
                'accuracy of the test at least 93.67 %', _told(ours, bayes), statistics.mean(ours) >= 0.9367,
                'python -m gptjax.train --config=configs/spam.py ...; python -m gptjax.evaluate --sets=test=FOLDER/test.jsonl ...')


@bar
def spam_from_base(folder: Path) -> Result:
  used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
  before = used()
  lines = train('base_small', folder / 'base', f'--config.data.source.path={given("books/train")}')
  seconds = used() - before
  ours, bayes = _accuracies(folder, 'spam_from_base', f'--config.init_from={folder}/base',
                            f'--config.data.tokenizer.path={folder}/base/data/tokenizer')
  mean = statistics.mean(ours)
  return Result('the same messages and splits, from a base model that a recipe pretrains on books in at most 900 CPU-seconds: mean '
                'accuracy of the test at least that of naive Bayes, and 96.67 %', f'base {seconds:.0f} CPU-seconds, '
                f'{lines[-1]["eval/valid/bits_per_byte"]:.2f} bits per byte; {_told(ours, bayes)}',
                seconds <= 900 and mean >= max(statistics.mean(bayes), 0.9667),
                'python -m gptjax.train --config=configs/base_small.py ...; python -m gptjax.train --config=configs/spam_from_base.py ...')


def _accuracies(folder: Path, recipe: str, *flags: str) -> tuple[list[float], list[float]]:
  """Accuracies on the test of each split, of runs with the same seeds and of naive Bayes."""
  ours, bayes = [], []
  for seed in SPLITS:
    data, workdir = folder / f'data{seed}', folder / f'run{seed}'
    python('examples.spam', f'--file={given("sms_spam/SMSSpamCollection")}', f'--out={data}', f'--seed={seed}')
    train(recipe, workdir, f'--config.data.source.path={data}/train.jsonl', f'--config.seed={seed}', *flags)
    python('gptjax.evaluate', f'--workdir={workdir}', f'--sets=test={data}/test.jsonl')
    found = json.loads((workdir / 'evaluation.json').read_text())
    ours.append(found['accuracy'])
    bayes.append(found['class_baselines']['naive Bayes']['test']['accuracy'])
  return ours, bayes


def _told(ours: list[float], bayes: list[float]) -> str:
  spread = lambda values: (f'{statistics.mean(values):.2%}, standard deviation {statistics.stdev(values):.2%} '
                           f'({", ".join(f"{value:.2%}" for value in values)})')
  return f'model {spread(ours)}; naive Bayes {spread(bayes)}'
