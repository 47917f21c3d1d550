"""Each filter applies its limit, and evaluation text is found regardless of position, case and punctuation."""

import dataclasses
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from gptjax.config import UserError
from gptjax.data.filters import Contamination, Filters
from gptjax.data.sources.source import Document

SENTENCE = 'The quick brown fox jumps over the lazy dog and then it sleeps until the morning comes again'


@given(text=st.text())
@settings(max_examples=100, deadline=None, database=None)
def test_by_default_everything_passes(text):
  assert Filters().reason(text) is None


@pytest.mark.parametrize(('filters', 'passes', 'dropped'), [
  (Filters(min_chars=3), ['abc', '日本語'], ['', 'ab']),
  (Filters(max_chars=3), ['', 'abc'], ['abcd']),
  (Filters(min_letters=0.5), ['ab', 'a! ', 'a  \n !', '日。', 'é1--'], ['', ' \n', 'a!!', '___a', '=' * 9]),
  (Filters(max_repeated_lines=0.5), ['', '\n\n\n', 'a\nb\nc', 'a\n\na', 'ab\nab\n', ' x \nx'], ['a\na\na', 'ab\n ab\nab\nc']),
  (Filters(max_repeated_lines=0.0), ['a\nb', '\n\n'], ['a\na'])])
def test_a_filter_drops_documents_beyond_its_limit(filters, passes, dropped):
  [name] = [field.name for field in dataclasses.fields(filters) if getattr(filters, field.name) != field.default]
  assert [filters.reason(text) for text in passes] == [None] * len(passes)
  assert [filters.reason(text) for text in dropped] == [name] * len(dropped)
  assert pickle.loads(pickle.dumps(filters)) == filters


@pytest.mark.parametrize(('field', 'value'), [
  ('min_chars', -1), ('max_chars', -1), ('min_letters', 1.5), ('min_letters', -0.1), ('max_repeated_lines', 2.0),
  ('min_letters', float('nan'))])
def test_an_invalid_limit_is_an_error_that_names_its_flag(field, value):
  with pytest.raises(UserError, match=rf'^--{field}: '):
    Filters(**{field: value})


def test_contradictory_limits_are_an_error():
  with pytest.raises(UserError, match=r'^--max_chars: 5, expected: 0 \(no limit\), or at least --min_chars=6'):
    Filters(min_chars=6, max_chars=5)


def contamination(**sets):
  return Contamination({name: [Document(str(i), text) for i, text in enumerate(texts)] for name, texts in sets.items()})


def words(count, seed=0):
  return random.Random(seed).choices([f'w{i}' for i in range(10_000)], k=count)


def brute(train, evaluation):
  """Whether they share a run of words, with lists."""
  n = min(len(evaluation), 13)
  runs = {tuple(evaluation[i:i + n]) for i in range(len(evaluation) - n + 1)}
  return n >= 8 and any(tuple(train[i:i + n]) in runs for i in range(len(train) - n + 1))


@given(length=st.integers(0, 30), start=st.integers(0, 30), stop=st.integers(0, 30), around=st.integers(0, 20))
@settings(max_examples=300, deadline=None, database=None)
def test_a_common_ngram_is_found_exactly_if_there_is_one(length, start, stop, around):
  evaluation = words(length)
  train = words(around, 1) + evaluation[start:stop] + words(around, 2)
  found = contamination(one=['other ' * 20], test=[' '.join(evaluation)]).find(' '.join(train))
  assert (found == 'test') == brute(train, evaluation)
  assert found in ('test', None)


def test_case_and_signs_and_line_ends_do_not_matter():
  found = contamination(test=[SENTENCE])
  assert found.find('x ' + SENTENCE.upper().replace(' ', ' --\n_ ') + '!') == 'test'
  assert found.find(SENTENCE.replace('lazy', 'sleepy')) is None
  assert found.find('') is None


def test_short_documents_are_matched_completely_and_the_shortest_are_counted():
  found = contamination(test=['one two three four five six seven', 'one two three four five six seven eight'], none=[])
  assert found.skipped == {'test': 1, 'none': 0}
  assert found.find('Zero, one two three four five six seven eight nine.') == 'test'
  assert found.find('one two three four five six seven nine eight') is None


def test_find_returns_the_first_set_that_has_the_ngram():
  first, second = ' '.join(words(40, 1)), ' '.join(words(40, 2))
  found = contamination(a=[first], b=[second, first])
  assert [found.find(first), found.find(second), found.find(' '.join(words(40, 3)))] == ['a', 'b', None]


def test_without_sets_nothing_is_found():
  assert Contamination({}).find(SENTENCE) is None
  assert contamination(test=[]).find(SENTENCE) is None


def test_contamination_pickles_small_and_finds_the_same_in_every_process():
  found = contamination(test=[' '.join(words(20_000)), SENTENCE])
  found.find(' '.join(words(50_000, 1)))
  data = pickle.dumps(found)
  assert len(data) < 11 * 20_000 + 2_000  # a run takes 8 bytes and its set 2; words are not kept
  code = f'import pickle, sys; print(pickle.load(sys.stdin.buffer).find({SENTENCE!r}))'
  done = subprocess.run([sys.executable, '-c', code], input=data, capture_output=True, check=True)
  assert done.stdout == b'test\n'


def test_ngrams_of_common_words_have_distinct_hashes():
  """All runs over three words: differing ones never have the same hash."""
  text = np.random.default_rng(0).choice(['the', 'of', 'a'], 100_000).tolist()
  found = contamination(test=[' '.join(text)])
  assert len(found._ngrams[13][0]) == len({tuple(text[i:i + 13]) for i in range(len(text) - 12)})
