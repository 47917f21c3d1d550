"""metrics.jsonl and samples.jsonl have one JSON object per line, and none of later steps after a resume."""

import io
import json
import re
import sys

import pytest
from tensorboardX.proto import event_pb2, plugin_hparams_pb2
from tiny import small_disk

from gptjax import config as configs
from gptjax.config import Config, UserError
from gptjax.evaluation import Score
from gptjax.files import complete_lines
from gptjax.training.logbook import Logbook

METRICS = {'loss': 2.5, 'tokens_per_second': 1e4, 'mfu': 0.25}


@pytest.fixture
def open_book(tmp_path):
  """A function (step): the logbook of a run of 10 steps that continues after `step`."""
  return lambda step=0: Logbook(tmp_path, step, 10)


def lines(folder, name='metrics.jsonl'):
  # A number that is not finite would be no JSON: NaN is refused here.
  return [json.loads(line, parse_constant=pytest.fail) for line in (folder / name).read_text().splitlines()]


def test_lines_are_written_at_once_and_in_order(tmp_path, open_book):
  book = open_book()
  book.step(1, METRICS)
  book.validation(1, {'valid': Score(loss=2.0, perplexity=7.4, bits_per_byte=1.5, tokens=10, bytes=30.0)})
  book.sample(1, 'to ', 'be\n"or" \u2028 not')
  book.step(2, METRICS | {'loss': 2.25})
  assert lines(tmp_path) == [
    {'step': 1, **METRICS},
    {'step': 1, 'eval/valid/loss': 2.0, 'eval/valid/perplexity': 7.4, 'eval/valid/bits_per_byte': 1.5},
    {'step': 2, **METRICS, 'loss': 2.25}]
  assert lines(tmp_path, 'samples.jsonl') == [{'step': 1, 'prompt': 'to ', 'text': 'be\n"or" \u2028 not'}]


def test_records_of_later_steps_are_removed(tmp_path, open_book):
  book = open_book()
  for step in range(1, 7):
    book.step(step, METRICS)
    book.sample(step, '', f'\u2028\x0c{step}')
  book.close()
  again = open_book(4)
  for name in ('metrics.jsonl', 'samples.jsonl'):
    assert [line['step'] for line in lines(tmp_path, name)] == [1, 2, 3, 4]
  again.step(5, METRICS)
  assert [line['step'] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
  assert not list(tmp_path.glob('*.partial'))


@pytest.mark.parametrize('rest', ['{"step": 3, "lo', '{', '{"step": 3}'])
def test_an_unfinished_last_line_is_dropped(rest, tmp_path, open_book):
  complete = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n'
  (tmp_path / 'metrics.jsonl').write_text(complete + rest)
  open_book(3).step(4, METRICS)
  assert (tmp_path / 'metrics.jsonl').read_text().startswith(complete + '{"step": 4, ')


def test_a_new_run_starts_with_empty_records(tmp_path, open_book):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n')
  open_book(0)
  assert (tmp_path / 'metrics.jsonl').read_text() == ''


def test_values_that_are_not_finite_become_null(tmp_path, open_book):
  nan, inf = float('nan'), float('inf')
  book = open_book()
  book.step(1, METRICS | {'loss': nan, 'grad_norm': inf})
  book.validation(1, {'valid': Score(nan, nan, -inf, 5, 9.0)})
  first, second = lines(tmp_path)
  assert first['loss'] is None and first['grad_norm'] is None and first['mfu'] == 0.25
  assert second == {'step': 1, 'eval/valid/loss': None, 'eval/valid/perplexity': None, 'eval/valid/bits_per_byte': None}


def events(folder):
  """TensorBoard's records below a folder: a length, its checksum, the event, its checksum."""
  for file in sorted((folder / 'tensorboard').iterdir()):
    data = file.read_bytes()
    while data:
      size = int.from_bytes(data[:8], 'little')
      yield event_pb2.Event.FromString(data[12:12 + size])
      data = data[16 + size:]


@pytest.mark.parametrize('checkpoint', [0, 2])
def test_tensorboard_gets_the_same_values_and_discards_repeated_steps(checkpoint, tmp_path, open_book):
  book = open_book()
  book.header({'device': 'cpu'}, configs.flatten(Config()))
  for step in (1, 2, 3):
    book.step(step, METRICS)
  book.close()
  again = open_book(checkpoint)
  again.step(3, METRICS)
  again.sample(3, 'to ', 'be\nor')
  again.close()
  found = [(event.step, value.simple_value) for event in events(tmp_path) for value in event.summary.value
           if value.tag == 'train/loss']
  assert found == [(1, 2.5), (2, 2.5), (3, 2.5), (3, 2.5)]
  text, = (value for event in events(tmp_path) for value in event.summary.value if value.tag.startswith('sample'))
  assert text.metadata.plugin_data.plugin_name == 'text' and text.tensor.string_val == [b'    to be\n    or']
  told = [value.metadata.plugin_data for event in events(tmp_path) for value in event.summary.value
          if value.tag == '_hparams_/session_start_info']
  given = plugin_hparams_pb2.HParamsPluginData.FromString(told[0].content).session_start_info.hparams
  assert given['model.layers'].number_value == 4 and given['optimizer.name'].string_value == 'adamw' and len(given) > 50
  starts = [event.step for event in events(tmp_path) if event.HasField('session_log')]
  assert starts[-1] == checkpoint + 1  # TensorBoard drops what earlier processes wrote from this step on


def test_lines_wait_in_memory_for_a_full_disk(tmp_path, capsys):
  with small_disk(tmp_path / 'disk', '64k') as disk:
    (disk / 'filler').write_bytes(b'x' * 40_000)
    book = Logbook(disk, 0, 1000)
    for step in range(1, 501):
      book.step(step, METRICS)
    with pytest.raises(UserError, match='a disk with space left'):
      book.flush()
    assert len(complete_lines(disk / 'metrics.jsonl')) < 500
    (disk / 'filler').unlink()
    book.flush()
    assert [json.loads(line)['step'] for line in complete_lines(disk / 'metrics.jsonl')] == [*range(1, 501)]
    book.close()
  assert capsys.readouterr().err.count('its lines stay in memory') == 1


def test_stderr_gets_one_line_per_step(open_book, capsys):
  book = open_book()
  book.header({'mesh': 'data 1 x model 1', 'steps': 10}, {})
  book.step(1, METRICS)
  book.step(5, {'loss': 2.25})
  book.say('[bold] is no markup')
  captured = capsys.readouterr()
  assert captured.out == ''
  start = ' mesh  data 1 x model 1\nsteps  10\nstep 1/10  loss 2.5000  10,000 tokens/s  MFU 25.0%\nstep 5/10  loss 2.2500  0:00:0'
  assert captured.err.startswith(start)
  assert captured.err.endswith('[bold] is no markup\n')


def test_a_terminal_keeps_a_line_of_each_logged_step(open_book, monkeypatch):
  terminal = io.StringIO()
  monkeypatch.setattr(terminal, 'isatty', lambda: True)
  monkeypatch.setattr(sys, 'stderr', terminal)
  monkeypatch.setenv('TERM', 'xterm')
  book = open_book()
  for step in (1, 2, 3):
    book.step(step, METRICS | {'loss': 3 - step / 4})
  book.close()
  assert book.console.is_terminal
  kept = re.findall(r'(step \d/10  loss [\d.]+)  10,000 tokens/s.*\n', terminal.getvalue())
  assert kept == ['step 1/10  loss 2.7500', 'step 2/10  loss 2.5000', 'step 3/10  loss 2.2500']


def test_a_run_continues_after_its_terminal_is_gone(tmp_path, open_book):
  class Broken(io.StringIO):
    def write(self, text):
      raise BrokenPipeError

  book = open_book()
  book.console.file = Broken()
  book.say('to no reader')
  book.step(1, METRICS)
  book.close()
  assert [line['step'] for line in lines(tmp_path)] == [1]
