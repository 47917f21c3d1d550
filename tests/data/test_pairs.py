"""Pairs of answers become parts of one example, whose answers alone are targets, and which see nothing of each other."""

import json

import numpy as np
import pytest

from gptjax.config import SourceConfig, UserError
from gptjax.data import EvalRows, Recipe, open_source, write_store
from gptjax.data.examples import marked_example
from gptjax.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
RECORDS = [{'q': f'{i}:', 'w': f'yes {i}' * (1 + i % 3), 'l': f'no{i}'} for i in range(7)]
FIELDS = {'prompt': 'q', 'chosen': 'w', 'rejected': 'l'}


def store_of(folder, records, tokenizer=TOKENIZER, **fields):
  (folder / 'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
  return write_store(folder / 'store', Recipe(open_source(SourceConfig(str(folder / 'a.jsonl'), **fields)), tokenizer))


def parts_of(batch):
  """(text, targets) of each part of all rows, in order."""
  found = []
  for tokens, targets, mask, segments, positions in zip(*(batch[name] for name in ('tokens', 'targets', 'mask', 'segments', 'positions'))):
    for number in range(1, segments.max() + 1):
      here = segments == number
      assert (positions[here] == np.arange(here.sum())).all() and (np.diff(np.flatnonzero(here)) == 1).all()
      found.append((TOKENIZER.decode(tokens[here][1:].tolist()), TOKENIZER.decode(targets[here & (mask > 0)].tolist())))
      assert targets[here & (mask > 0)][-1] == TOKENIZER.eos_id
  return found


@pytest.mark.parametrize('mismatched', [False, True])
def test_each_part_is_its_prompt_with_its_answer_and_rows_have_complete_pairs(mismatched, tmp_path):
  store = store_of(tmp_path, RECORDS, **FIELDS, mismatched=mismatched)
  rows = EvalRows(store, 64, True, tmp_path)
  size = 2 + mismatched
  parts = parts_of(rows.batch(np.arange(rows.count)))
  groups = [parts[at:at + size] for at in range(0, len(parts), size)]
  expected = []
  for i, record in enumerate(RECORDS):
    answers = [record['w'], record['l'], *[RECORDS[i - 1]['w']] * mismatched]
    expected.append([(record['q'] + answer, answer) for answer in answers])
  assert sorted(groups) == sorted(expected)
  assert store.parts == size and store.documents == 7 and store.targets == sum(len(one) + 1 for group in expected for _, one in group)
  assert marked_example(store, TOKENIZER).startswith('<1>0:⟦yes 0<1>⟧<1>0:⟦no0<1>⟧')


def test_conversations_that_differ_in_their_last_answer(tmp_path):
  turns = lambda *contents: [{'role': role, 'content': content} for role, content in zip(('user', 'assistant') * 2, contents)]
  records = [{'a': turns('Hi', 'Hello', f'{i}?', f'right {i}'), 'b': turns('Hi', 'Hello', f'{i}?', f'wrong {i}')} for i in range(3)]
  store = store_of(tmp_path, records, TOKENIZER.for_chat('plain'), chosen='a', rejected='b', chat='plain')
  rows = EvalRows(store, 256, True, tmp_path)
  parts = parts_of(rows.batch(np.arange(rows.count)))
  assert [answer for _, answer in parts] == [f'{word} {i}' for i in range(3) for word in ('right', 'wrong')]
  assert all('Hello' in text and text.endswith(answer) for text, answer in parts)
  for other in (turns('Ho', 'Hello', '0?', 'wrong'), turns('Hi', 'Hallo', '0?', 'wrong'), turns('Hi', 'Hello', '0?'), records[0]['a']):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    with pytest.raises(UserError, match='a.jsonl:1: .*expected: (two answers, which differ, to the same messages|an example whose)'):
      store_of(folder, [{'a': records[0]['a'], 'b': other}], TOKENIZER.for_chat('plain'), chosen='a', rejected='b', chat='plain')
