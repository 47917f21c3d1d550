"""Results as records, tables and plots; the sets that --sets selects."""

import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from small_stores import make_store, texts

from gptjax.config import SourceConfig, UserError
from gptjax.data import HeldOut, Recipe, open_source, write_store
from gptjax.data.store import manifest_sha256
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.evaluation import Score, Scores, choose_sets, draw, record, results, table
from gptjax.files import json_line

TOKENIZER = ByteTokenizer()
TASK = {'acc': 0.5, 'acc_stderr': 0.1, 'perplexity': 12345.678, 'examples': 7, 'fewshot': 0, 'version': 1.0}


def scores(loss):
  one = lambda loss: Score(loss, 2.0, loss / 2, 10, 30.0)
  return Scores({'a': one(loss), 'b': one(loss + 1)}, {'both': one(loss + 0.5)})


def test_a_record_has_all_scores_and_nothing_else():
  found = record(3, scores(1.0), {'piqa': TASK})
  assert found['loss'] == 1.5 and found['tokens'] == 20 and found['step'] == 3
  assert found['sets']['b']['loss'] == 2.0 and {*found['tags']} == {'both'} and found['tasks'] == {'piqa': TASK}
  assert {*record(3, scores(1.0), None)} == {'loss', 'perplexity', 'bits_per_byte', 'tokens', 'bytes', 'step', 'sets', 'tags'}
  assert record(3, None, {'piqa': TASK}) == {'step': 3, 'tasks': {'piqa': TASK}}
  assert json.loads(json_line(record(3, None, {'x': {'acc': float('nan')}}))) == {'step': 3, 'tasks': {'x': {'acc': None}}}


def test_a_table_has_one_line_per_score():
  found = table([record(step, scores(step / 100), {'piqa': TASK}) for step in (100, 200)]).splitlines()
  assert [line.split()[:2] for line in found[1:9]] == [[step, name] for step in ('100', '200') for name in ('a', 'b', 'tag/both', 'all')]
  assert found[5].split() == ['200', 'a', '2.0000', '2.000', '1.0000', '10']
  assert [line.split()[1:] for line in found[-2:]] == [['piqa', 'acc', '0.5000', '0.1000', '7'], ['piqa', 'perplexity', '12,345.7', '7']]
  alone = Scores({'a': scores(1.0).sets['a']}, {})
  assert table([record(100, alone, None)]) == '' and len(table([record(step, alone, None) for step in (1, 2)]).splitlines()) == 3


def test_every_set_has_its_own_score_whatever_it_is_called(monkeypatch, tmp_path):
  one = lambda loss, tokens: Score(loss, 2.0, loss / 2, tokens, 30.0)
  names = {'valid': one(1.0, 10), 'other': one(2.0, 10), '_a$_{$': one(4.0, 20)}
  found = record(7, Scores(names, {}), None)
  lines = [line.rsplit(maxsplit=4)[:2] for line in table([found]).splitlines()[1:]]
  assert [(line.split(maxsplit=1)[1].strip(), float(loss)) for line, loss in lines] == [
    ('valid', 1.0), ('other', 2.0), ('_a$_{$', 4.0), ('all sets', 2.75)]
  drawn = []
  monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda self, path, save=Figure.savefig, **named: (
    drawn.append({handle.get_label().strip(): handle[0].get_ydata().tolist()
                  for handle in self.axes[1].get_legend_handles_labels()[0]}), save(self, path, **named)))
  assert draw([found, found | {'step': 8}], tmp_path / 'picture.png')
  assert drawn == [{'valid': [1.0] * 2, 'other': [2.0] * 2, '_a$_{$': [4.0] * 2, 'all sets': [2.75] * 2}]


def test_all_kinds_of_scores_are_plotted(tmp_path):
  for index, kinds in enumerate([(True, True), (True, False), (False, True)]):
    records = [record(step, scores(1 / step) if kinds[0] else None, {'piqa': TASK} if kinds[1] else None) for step in (1, 2, 3)]
    draw(records, tmp_path / f'{index}.png')
    assert (tmp_path / f'{index}.png').read_bytes().startswith(b'\x89PNG')


@pytest.fixture
def held_out(tmp_path):
  stores = {name: make_store(tmp_path / name, [5, 9], vocab_size=259, draw=lambda count: np.full(count, 7)) for name in ('a', 'b')}
  return HeldOut(TOKENIZER, stores, {'both': ['a', 'b'], 'one': ['b']})


def test_sets_are_the_runs_own_unless_others_are_selected(held_out, tmp_path):
  assert choose_sets(None, held_out, SourceConfig(), tmp_path) == (held_out.valid, held_out.tags)
  assert choose_sets([], held_out, SourceConfig(), tmp_path) == ({}, {})
  text = tmp_path / 'text.txt'
  text.write_text('a few words, déjà vu')
  chosen, tags = choose_sets(['b', f'mine={tmp_path}/a', f'text={text}'], held_out, SourceConfig(), tmp_path / 'cache')
  assert [*chosen] == ['b', 'mine', 'text'] and tags == {'one': ['b']}
  assert chosen['mine'].sha256 == held_out.valid['a'].sha256
  assert (chosen['text'].documents, texts(chosen['text'])) == (1, ['a few words, déjà vu'])
  again, _ = choose_sets([f'text={text}'], held_out, SourceConfig(), tmp_path / 'cache')
  assert again['text'].sha256 == chosen['text'].sha256 and len([*(tmp_path / 'cache/data').iterdir()]) == 1


def test_a_mistake_in_sets_is_one_error_line(held_out, tmp_path):
  make_store(tmp_path / 'other', [5], vocab_size=259)
  (tmp_path / 'blank.jsonl').write_text('{"text": " "}\n\n')  # a score of nothing would divide by 0
  manifest = json.loads((tmp_path / 'other/manifest.json').read_text()) | {'tokenizer_sha256': 'f' * 64}
  (tmp_path / 'other/manifest.json').write_text(json.dumps(manifest | {'sha256': manifest_sha256(manifest)}))
  for wanted, message in [
      (['c'], "^--sets: 'c', expected: a, b; or NAME=STORE"), (['a', 'a'], "^--sets: 'a', expected: NAME, "),
      (['a='], "^--sets: 'a=', expected: "), ([f'all sets={tmp_path}/b'], '^--sets: .*another name'),
      ([f'tag/both={tmp_path}/b'], '^--sets: .*another name'),
      ([f'x={tmp_path}/other'], "^--sets: 'x=.*other', expected: a store made with the run's tokenizer .*, not ffffffffffff"),
      ([f'x={tmp_path}/nothing.txt'], "nothing.txt', expected: "),
      ([f'x={tmp_path}/blank.jsonl'], "^source: 'blank.jsonl', expected: documents; none of its 2 records is left")]:
    with pytest.raises(UserError, match=message):
      choose_sets(wanted, held_out, SourceConfig(), tmp_path)
  with pytest.raises(UserError, match="^--sets: 'c', expected: no names \\(the run has no sets of its own\\)"):
    choose_sets(['c'], HeldOut(TOKENIZER, {}, {}), SourceConfig(), tmp_path)


@pytest.mark.parametrize('values', [(3.0, 3000.0), (1.1, 1.2)])
def test_labels_of_axes_are_numbers(values, tmp_path, monkeypatch):
  of = lambda value: {'t': {'perplexity': value, 'examples': 1, 'fewshot': 0, 'version': 1}}
  records = [record(step, None, of(value)) for step, value in enumerate(values)]
  drawn = []
  monkeypatch.setattr(results, 'save_figure', lambda figure, path, dpi: (FigureCanvasAgg(figure).draw(), drawn.append(figure)))
  assert draw(records, tmp_path / 'a.png')
  labels = [text.get_text() for text in drawn[0].findobj(Text) if text.get_text()]
  assert '100' in labels if max(values) > 1000 else len(labels) > 5
  assert not any('$' in label for label in labels)


def test_files_of_a_run_with_examples_have_such_examples(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"q": "one? ", "a": "two"}\n' * 3)
  source = SourceConfig('tfds:train', split='train[:9]', prompt='q', completion='a')
  chosen, _ = choose_sets([f'new={tmp_path}/a.jsonl'], HeldOut(TOKENIZER, {}, {}), source, tmp_path / 'cache')
  assert chosen['new'].weighted and chosen['new'].targets == 3 * 4


def test_files_of_a_run_on_stores_of_examples_are_refused(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"q": "one? ", "a": "two"}\n' * 3)
  source = SourceConfig(str(tmp_path / 'a.jsonl'), prompt='q', completion='a')
  store = write_store(tmp_path / 'store', Recipe(open_source(source), TOKENIZER))
  with pytest.raises(UserError, match=r"^--sets: 'new=.*a.jsonl', expected: NAME=STORE"):
    choose_sets([f'new={tmp_path}/a.jsonl'], HeldOut(TOKENIZER, {'valid': store}, {}), SourceConfig(), tmp_path / 'cache')


def test_only_finite_numbers_are_plotted(tmp_path):
  of = lambda *values: [record(step, None, {'t': {'bits': value, 'examples': 1, 'fewshot': 0, 'version': 1}})
                        for step, value in enumerate(values)]
  assert not draw(of(float('nan'), float('nan')), tmp_path / 'none.png') and not (tmp_path / 'none.png').exists()
  assert draw(of(1.2, 0.9), tmp_path / 'some.png')  # neither a share nor above all shares
