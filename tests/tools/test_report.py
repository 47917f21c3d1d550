"""The report of a run: whole, self-contained, safe to open whatever the run holds, and honest about what went wrong."""

import html.parser
import json
import math
import pathlib
import re
import shutil

import numpy as np
import pytest
from commands import run_module

from gptjax.config import Config, UserError, override, to_json
from tools.report import MOST_POINTS, _thinned, page, verdict
from tools.run_files import Run, series

EVIL = '</pre></style><script>alert(1)</script><img src=https://example.com/x onerror=alert(1)>"\'&$\\frac{'
SCORE = {'loss': 2.25, 'perplexity': 9.49, 'bits_per_byte': 1.43, 'tokens': 1_203_456, 'step': 200}
BASELINES = {'gzip -9': 1.98, 'xz -9': 1.6}
VOID = {'meta', 'link', 'img', 'br', 'hr', 'input'}


def training_line(step: int, loss: float | None = None) -> dict[str, object]:
  return {'step': step, 'loss': 2 + 6 / step if loss is None else loss, 'grad_norm': 1.0, 'learning_rate': 1e-3,
          'tokens': 4096 * step, 'tokens_per_second': 61_000.0, 'mfu': 0.412}


def validation_line(step: int, name: str = 'valid') -> dict[str, object]:
  scores = {'loss': 2.2, 'perplexity': 9.0, 'bits_per_byte': 1.45}
  return {'step': step} | {f'eval/{name}/{metric}': value for metric, value in scores.items()}


def write_lines(path: pathlib.Path, rows: list[dict[str, object]]) -> None:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
  """A run of 200 steps with one validation set and eight samples."""
  folder = tmp_path / 'small-run'
  folder.mkdir()
  config = override(Config(), {'model.width': 192, 'eval.prompt': 'def f('})
  (folder / 'config.json').write_text(to_json(config))
  (folder / 'run.json').write_text(json.dumps({'device': '8 x TPU v5e', 'parameters': 1_234_567, 'restored': None}))
  (folder / 'evaluation.json').write_text(json.dumps(SCORE | {'baselines': BASELINES}))
  rows = [*map(training_line, range(1, 201)), validation_line(100), validation_line(200)]
  write_lines(folder / 'metrics.jsonl', rows)
  write_lines(folder / 'samples.jsonl', [
      {'step': 25 * n, 'prompt': 'def f(', 'text': f'sample{n} <b> & "x"'} for n in range(1, 9)])
  return folder


class Page(html.parser.HTMLParser):
  """What a browser would see: the text, the tags with their attributes, and whether they are balanced."""

  def __init__(self, text: str):
    super().__init__()
    self.text, self.tags, self.attributes = '', [], []
    self._open: list[str] = []
    self.feed(text)
    self.close()
    assert not self._open

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append(tag)
    self.attributes += attrs
    self._open += [tag] * (tag not in VOID)

  def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag: str) -> None:
    assert self._open.pop() == tag

  def handle_data(self, data: str) -> None:
    self.text += data


def data_of(text: str) -> dict[str, list]:
  """What the page's script draws."""
  return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def assert_self_contained(text: str, found: Page) -> None:
  """Nothing runs but the page's own script, and nothing is loaded from anywhere."""
  assert found.tags.count('script') == 2 and text.count('</script>') == 2
  assert not {'img', 'link', 'iframe', 'object', 'embed', 'image', 'base', 'form'}.intersection(found.tags)
  for name, value in found.attributes:
    assert not name.startswith('on') and name not in ('src', 'srcset', 'data', 'action')
    assert not name.endswith('href') or (value or '').startswith('./')
  assert not re.search(r'url\((?!#)|@import', text)


def test_page_holds_every_part(workdir: pathlib.Path):
  text = page([workdir])
  found = Page(text)
  assert 'Validation 1.43 bits per byte at step 200, 28 % below gzip -9 and 11 % below xz -9.' in found.text
  for part in ('small-run', '9.49', '1,203,456', '61,000', '41.2 %',  # final figures
               'gzip -9', '1.980', '28 % below', 'xz -9', '1.600', '11 % below',  # baselines
               'training', 'valid', 'nats per token', 'bits per byte', 'tokens per second', 'step',  # pictures
               '8 x TPU v5e', '1,234,567', 'null',  # header
               'model.width', '192', '128', 'optimizer.peak_lr = 0.001'):  # config
    assert part in found.text
  assert '<mark>model.width = 192  # default 128</mark>' in text and '<mark>model.layers' not in text
  assert re.search('<details>.*model.layers = 4.*</details>', text, re.DOTALL)
  drawn = {chart['title']: chart for chart in data_of(text)['charts']}
  assert {name: chart['unit'] for name, chart in drawn.items()} == {
    'Loss': 'nats per token', 'Validation': 'bits per byte', 'Learning rate': 'rate', 'Gradient norm': 'global L2 norm',
    'Speed': 'tokens per second', 'Model FLOPs utilization': 'fraction of the peak'}
  assert [line['label'] for line in drawn['Loss']['lines']] == ['training', 'valid']
  assert drawn['Loss']['lines'][0]['values'][:2] == [8.0, 5.0] and drawn['Loss']['lines'][1]['steps'] == [100, 200]
  assert [one['label'] for one in drawn['Validation']['baselines']] == ['gzip -9', 'xz -9']
  widths = [float(width) for width in re.findall(r'<i style="width: ([\d.]+)%', text)]
  assert widths == pytest.approx([100 * value / 1.98 for value in (1.43, 1.98, 1.6)], abs=0.1)
  assert re.findall(r'sample(\d) <b> & "x"', found.text) == list('87654321')  # newest first
  assert '3 earlier ones' in found.text


def test_sets_and_tags_have_rows_of_their_own(workdir: pathlib.Path):
  mixture = {'data.train': [{'store': 'stores/books', 'weight': 2}], 'data.valid': [{'name': 'prose', 'store': 'x', 'tags': ['old']}]}
  (workdir / 'config.json').write_text(to_json(override(Config(), mixture)))
  one = {'loss': 3.125, 'perplexity': 22.8, 'bits_per_byte': 1.875, 'tokens': 4321, 'bytes': 9999.0}
  (workdir / 'evaluation.json').write_text(json.dumps(SCORE | {'sets': {'prose': one, 'verse': one}, 'tags': {'old': one}}))
  write_lines(workdir / 'metrics.jsonl', [training_line(1), validation_line(1, 'verse'), validation_line(1, 'tag/old')])
  found = Page(page([workdir]))
  for part in ('prose', 'verse', 'old', '3.125', '1.875', '4,321', 'stores/books', '"weight": 2'):
    assert part in found.text
  assert 'tag/old' not in found.text  # one line a set is enough for a picture


@pytest.mark.parametrize('score, words', [
    ({'loss': 0.61, 'accuracy': 0.86, 'margin': 0.4, 'kl': 2.0, 'examples': 110, 'tokens': 5000},
     ('0.86 pair accuracy', 'nats per pair', '>110<')),
    ({'loss': -0.5, 'reward': 0.5, 'pass@1': 0.25, 'pass@8': 0.75, 'greedy': 0.625, 'examples': 40, 'tokens': 90},
     ('0.50 reward', 'pass@1', '>0.625<', 'prompts scored')),
    ({'loss': 0.3, 'perplexity': 1.3, 'bits_per_byte': 0.1, 'tokens': 9, 'accuracy': 0.9, 'macro_f1': 0.8, 'texts': 9},
     ('0.90 accuracy', 'macro F1', 'nats per text'))])
def test_pairs_prompts_and_texts_have_figures_of_their_own(workdir: pathlib.Path, score: dict, words: tuple[str, ...]):
  (workdir / 'evaluation.json').write_text(json.dumps(score | {'step': 200, 'sets': {'valid': score}}))
  write_lines(workdir / 'metrics.jsonl', [training_line(step) | {'reward': 0.1 * step} for step in range(1, 5)])
  text = page([workdir])
  assert all(word in text for word in words) and 'nan' not in text
  with pytest.raises(UserError, match='evaluation.json:1: '):
    (workdir / 'evaluation.json').write_text(json.dumps({name: value for name, value in score.items() if name != 'loss'}
                                                        | {'step': 200, [*score][1]: 'x'}))
    page([workdir])


def test_page_loads_nothing_and_follows_from_its_files_alone(workdir: pathlib.Path):
  text = page([workdir])
  assert_self_contained(text, Page(text))
  assert re.findall(r'https?://[^\'\s]*', text) == ['http://www.w3.org/2000/svg']  # the name of a kind of element
  assert page([workdir]) == text
  ids = re.findall(r' id="([^"]*)"', text)
  assert len(set(ids)) == len(ids)


def test_whatever_a_run_holds_is_shown_as_text(workdir: pathlib.Path):
  (workdir / 'config.json').write_text(to_json(override(Config(), {'eval.prompt': f'prompt {EVIL}'})))
  (workdir / 'run.json').write_text(json.dumps({f'key {EVIL}': f'value {EVIL}', 'nested': [EVIL], 'half': '\ud800'}))
  (workdir / 'evaluation.json').write_text(json.dumps(SCORE | {'baselines': {f'baseline {EVIL}': 2.0}}))
  write_lines(workdir / 'metrics.jsonl', [training_line(1), validation_line(1, f'set {EVIL}')])
  write_lines(workdir / 'samples.jsonl', [{'step': 1, 'prompt': f'start {EVIL}', 'text': f'end {EVIL}'}])
  text = page([workdir])
  found = Page(text)
  assert_self_contained(text, found)
  for place in ('prompt', 'key', 'value', 'baseline', 'start', 'end'):
    assert f'{place} {EVIL}' in found.text
  assert data_of(text)['charts'][0]['lines'][1]['label'] == f'set {EVIL}'


def test_optional_parts_may_be_absent(workdir: pathlib.Path):
  (workdir / 'samples.jsonl').unlink()
  (workdir / 'evaluation.json').write_text(json.dumps(SCORE))
  write_lines(workdir / 'metrics.jsonl', [{'step': 1, 'loss': 8.0}])
  text = page([workdir])
  assert 'Validation 1.43 bits per byte at step 200.' in Page(text).text
  assert 'gzip' not in text and 'utilization' not in text


@pytest.mark.parametrize('rows', [
    [],
    [training_line(0, 8.0)],
    [training_line(step, math.nan) for step in range(300)],
    [training_line(step, math.inf if step == 150 else 3e38 if step > 200 else 2.0) for step in range(300)]
    + [{'step': 300, 'eval/valid/loss': math.inf, 'eval/valid/bits_per_byte': None}],
], ids=['empty', 'one point', 'all nan', 'inf, null and huge'])
@pytest.mark.filterwarnings('error')
def test_broken_runs_have_a_report_too(workdir: pathlib.Path, rows: list[dict[str, object]]):
  scores = {'loss': math.nan, 'perplexity': math.inf, 'bits_per_byte': None}
  baselines = BASELINES | {'xz -9': math.nan}
  (workdir / 'evaluation.json').write_text(json.dumps(SCORE | scores | {'baselines': baselines}))
  write_lines(workdir / 'metrics.jsonl', rows)
  assert 'The validation loss is not finite at step 200' in Page(page([workdir])).text


@pytest.mark.parametrize(('change', 'baselines', 'rows', 'sentence'), [
    ({}, {}, [training_line(200)], 'Validation 1.43 bits per byte at step 200.'),
    ({}, {'zip': 1.3}, [training_line(200)], 'Validation 1.43 bits per byte at step 200, 10 % above zip.'),
    ({}, {'zip': 1.431}, [training_line(200)], 'Validation 1.43 bits per byte at step 200, level with zip.'),
    ({}, {'zip': 0.0}, [training_line(200)], 'Validation 1.43 bits per byte at step 200.'),
    ({}, {}, [], 'Validation 1.43 bits per byte at step 200, but metrics.jsonl holds no training step.'),
    ({}, {}, [training_line(5000)],
     'Validation 1.43 bits per byte at step 200, while training stands at step 5,000.'),
    ({}, {}, [training_line(1), training_line(2, math.nan), training_line(3, math.inf)],
     'Validation 1.43 bits per byte at step 200, but 2 of 3 training losses are not finite, the first at step 2.'),
    ({'bits_per_byte': math.nan}, BASELINES, [training_line(200)], 'The validation loss is not finite at step 200.'),
])
def test_verdict(change: dict[str, float], baselines: dict[str, float], rows: list[dict[str, object]], sentence: str):
  assert verdict(SCORE | change, baselines, rows) == sentence


@pytest.mark.parametrize('evaluation', [None, {'step': 200, 'tasks': {'lambada': {'acc': 0.5}}}])
def test_a_run_whose_documents_were_not_evaluated_has_a_report(workdir: pathlib.Path, evaluation: dict | None):
  (workdir / 'evaluation.json').unlink()
  if evaluation:
    (workdir / 'evaluation.json').write_text(json.dumps(evaluation))
  found = Page(page([workdir]))
  assert 'Not evaluated; python -m gptjax.evaluate scores the held-out documents.' in found.text
  assert '61,000' in found.text and 'sample8' in found.text and 'perplexity' not in found.text and 'nan' not in found.text


@pytest.mark.parametrize(('name', 'command'), [
    ('config.json', 'gptjax.train'), ('metrics.jsonl', 'gptjax.train'), ('run.json', 'gptjax.train')])
def test_a_missing_file_is_named_with_the_command_that_writes_it(workdir: pathlib.Path, name: str, command: str):
  (workdir / name).unlink()
  with pytest.raises(UserError, match=f'{re.escape(str(workdir / name))}.*python -m {command} .*--workdir={workdir}'):
    page([workdir])


@pytest.mark.parametrize(('name', 'text', 'place'), [
    ('metrics.jsonl', '{"step": 1}\n{"st\n{"step": 2}\n', 'metrics.jsonl:2'),
    ('metrics.jsonl', '{"loss": 2.0}\n', 'metrics.jsonl:1: step'),
    ('samples.jsonl', '7\n', 'samples.jsonl:1'),
    ('run.json', '"text"', 'run.json'),
    ('evaluation.json', '{"loss": 2.0}', 'evaluation.json:1: perplexity'),
    ('config.json', '{', 'config.json'),
    ('run.json', '[' * 100_000, 'run.json'),
    ('metrics.jsonl', '{"step": null}\n', 'metrics.jsonl:1: step'),
    ('metrics.jsonl', '{"step": 1, "loss": "x"}\n', 'metrics.jsonl:1: loss'),
    ('metrics.jsonl', '{"step": 1, "loss": ' + '9' * 400 + '}\n', 'metrics.jsonl:1: loss'),
    ('evaluation.json', json.dumps(SCORE | {'baselines': [1]}), 'evaluation.json: baselines'),
    ('evaluation.json', json.dumps(SCORE | {'sets': {'valid': {'loss': 'x'}}}), 'evaluation.json: sets: valid: loss'),
])
def test_a_damaged_file_is_named_with_the_place(workdir: pathlib.Path, name: str, text: str, place: str):
  (workdir / name).write_text(text)
  with pytest.raises(UserError, match=re.escape(str(workdir / place))):
    page([workdir])


def test_a_line_that_is_still_being_written_is_left_out(workdir: pathlib.Path):
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 201, "lo')
  assert 'while training stands' not in page([workdir])


def test_steps_that_ran_again_replace_the_first_ones():
  rows = [training_line(step, float(step)) for step in range(6)] + [training_line(step, -1.0) for step in (3, 4)]
  steps, losses = series(rows, 'loss')
  assert steps.tolist() == [0, 1, 2, 3, 4] and losses.tolist() == [0, 1, 2, -1, -1]
  assert series([], 'loss')[0].shape == (0,)


def test_long_curves_keep_their_peaks_and_gaps():
  values = np.sin(np.arange(50_000) / 900)
  values[[777, 31_234]] = 5, np.nan
  rows = [{'step': step, 'loss': value} for step, value in enumerate(values)]
  steps, found = _thinned(*series(rows, 'loss'))
  assert len(steps) <= MOST_POINTS and (np.diff(steps) > 0).all() and steps[[0, -1]].tolist() == [0, 49_999]
  assert found[steps == 777] == 5 and np.isnan(found[steps == 31_234]).all() and 31_234 in steps


def test_hours_are_those_of_the_steps():
  rows = [{'step': 1, 'tokens': 100}, {'step': 11, 'tokens': 1100, 'tokens_per_second': 10.0},
          {'step': 21, 'tokens': 2100, 'tokens_per_second': 2.0}]
  clock = Run('a', pathlib.Path(), Config(), rows, {}, {}, []).clock
  assert clock['step'] == [0, 1, 11, 21] and clock['tokens'] == [0, 100, 1100, 2100]
  assert clock['hours'] == pytest.approx([0, 0, 100 / 3600, 600 / 3600])


def test_several_runs_are_compared(workdir: pathlib.Path):
  other = workdir.parent / 'another'
  shutil.copytree(workdir, other)
  (other / 'config.json').write_text(to_json(override(Config(), {'model.width': 256, 'eval.prompt': 'def f('})))
  (other / 'evaluation.json').write_text(json.dumps(SCORE | {'bits_per_byte': 1.25}))
  (other / 'checkpoints/200').mkdir(parents=True)
  text = page([workdir, other], workdir)
  found = Page(text)
  assert_self_contained(text, found)
  assert 'another is the best of 2 runs: validation 1.250 bits per byte.' in found.text
  assert re.search(r'model.width</td><td>192</td><td>256', text) and 'optimizer.peak_lr</td>' not in text
  assert './../another/checkpoints/200' in text
  data = data_of(text)
  assert [one['key'] for one in data['keys']] == ['small-run', 'another'] and len(data['clocks']) == 2
  assert [line['key'] for line in data['charts'][0]['lines']] == ['small-run'] * 2 + ['another'] * 2
  same = page([workdir, workdir])
  assert 'The runs have equal configs.' in same and data_of(same)['keys'][0]['key'] == str(workdir)


def test_command_line(workdir: pathlib.Path):
  done = run_module('tools.report', f'--workdir={workdir}')
  report = workdir / 'report.html'
  assert (done.returncode, done.stdout, done.stderr) == (0, f'{report}\n', '')
  written = report.read_text(encoding='utf-8')
  assert written == page([workdir])

  (workdir / 'taken').mkdir()
  before = sorted(workdir.rglob('*'))
  refused = run_module('tools.report', f'--workdir={workdir}', f'--out={workdir / "taken"}')
  (workdir / 'config.json').rename(workdir.parent / 'elsewhere.json')
  missing = run_module('tools.report', f'--workdir={workdir}')
  (workdir.parent / 'elsewhere.json').rename(workdir / 'config.json')
  two = run_module('tools.report', f'--workdir={workdir}', f'--workdir={workdir.parent}')
  for done, named in ((refused, f'--out: {str(workdir / "taken")!r}'), (missing, str(workdir / 'config.json')),
                      (two, '--out: None, expected: the HTML file to write; with several runs')):
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith(f'error: {named}') and done.stderr.count('\n') == 1
  assert sorted(workdir.rglob('*')) == before and report.read_text(encoding='utf-8') == written
