"""One run from start to end: what it writes, how often it compiles, and that mistakes leave nothing behind."""

import collections
import contextlib
import io
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import config, files_below, options, records, run, small_disk, write_text

from gptjax import config as configs
from gptjax.checkpoint import Checkpoints
from gptjax.config import UserError
from gptjax.data import train_rows, prepare
from gptjax.training import loop, train
from gptjax.training.logbook import Logbook
from gptjax.compilations import CompileCounter
from gptjax.training.run import Steps


@pytest.fixture(scope='module')
def text(cache):
  return write_text(cache / 'text.txt')


@contextlib.contextmanager
def compiled_programs():
  """Names of the programs compiled so far, with the step at which each was, in order."""
  found, now = [], [0]
  heard = lambda event, _, fun_name='', **rest: found.append((now[0], fun_name)) if 'backend_compile' in event else None
  jax.monitoring.register_event_duration_secs_listener(heard)
  start = loop._Loop._step
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop._Loop, '_step', lambda self: (now.__setitem__(0, now[0] + 1), start(self)))
    yield found
  jax.monitoring.unregister_event_duration_listener(heard)


@pytest.fixture(scope='module')
def complete(text, cache):
  """A run with all that a run does, its records, and what it wrote and compiled; its seed is no other run's of these tests."""
  settings = config(text, seed=11, mesh__data=2, model__dropout=0.1, steps=10, eval__every=4, eval__sample_tokens=6,
                    eval__prompt=r'the\n', checkpoint__every=3)
  out, err = io.StringIO(), io.StringIO()
  with compiled_programs() as compiled, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    lines = run(settings, cache / 'complete', cache, log_every=3)
  return SimpleNamespace(settings=settings, workdir=cache / 'complete', lines=lines, compiled=compiled, out=out.getvalue(),
                         err=err.getvalue())


def test_a_run_compiles_its_step_once_and_nothing_later(complete, tmp_path, cache):
  assert [name for _, name in complete.compiled].count('jit(step)') == 1
  assert not [name for step, name in complete.compiled if step > 4]  # by then all has been done once
  with compiled_programs() as compiled:
    run(complete.settings, tmp_path, cache, stop_at=5)
  assert 'jit(step)' not in [name for _, name in compiled]  # an equal run of the same process compiles nothing again


def test_a_step_that_is_compiled_again_is_reported_and_the_run_continues(tmp_path, text, cache, monkeypatch, capsys):
  dispatch = Steps.dispatch
  # Other tests may have compiled the step, too: it is forgotten before the first one.
  monkeypatch.setattr(Steps, 'dispatch', lambda self: (self.step in (0, 5) and self._run.step.clear_cache(), dispatch(self))[1])
  lines = run(config(text, eval__every=0), tmp_path, cache)
  assert [line['step'] for line in lines if 'loss' in line] == [*range(1, 9)]
  assert capsys.readouterr().err.count('step 6: compiled again, 2 times so far') == 1


def test_a_run_writes_all_its_records(complete, text, cache):
  settings, workdir, lines = complete.settings, complete.workdir, complete.lines
  assert [(line['step'], 'loss' in line) for line in lines] == [
    (1, True), (3, True), (4, False), (6, True), (8, False), (9, True), (10, True), (10, False)]
  data = prepare(settings.data, cache)
  rows = train_rows(settings, data)
  seen = np.cumsum([rows.batch(4 * i + np.arange(4))['mask'].sum() for i in range(10)])
  steps = [line for line in lines if 'loss' in line]
  assert [line['tokens'] for line in steps] == [seen[line['step'] - 1] for line in steps]
  assert {*steps[0]} == {'step', 'loss', 'grad_norm', 'learning_rate', 'tokens'}
  assert {*lines[-1]} == {'step', 'eval/valid/loss', 'eval/valid/perplexity', 'eval/valid/bits_per_byte'}
  assert steps[-1]['loss'] < steps[0]['loss'] and lines[-1]['eval/valid/loss'] < lines[2]['eval/valid/loss']
  samples = records(workdir, 'samples.jsonl')
  assert [(line['step'], line['prompt']) for line in samples] == [(step, 'the\n') for step in (4, 8, 10)]
  assert all(0 < len(line['text']) <= 6 and {*line['text']} <= {*text.read_text()} for line in samples)
  assert Checkpoints(workdir / 'checkpoints').steps() == [9, 10]
  kept = configs.from_json((workdir / 'config.json').read_text())
  assert kept == configs.override(settings, {'model.vocab_size': data.tokenizer.vocab_size})
  header = json.loads((workdir / 'run.json').read_text())
  assert header['mesh'] == 'data 2 x model 1, ZeRO stage 0' and header['device'].startswith('2 of 8 cpu')
  assert complete.err.index('compiling the step') < complete.err.index('step 1/10')
  assert complete.out == '' and all(f'{name}  {value}' in complete.err for name, value in header.items())
  assert {path.split('/')[0] for path in files_below(workdir)} == {
    'checkpoints', 'config.json', 'data', 'lock', 'metrics.jsonl', 'run.json', 'samples.jsonl', 'tensorboard'}


@pytest.mark.parametrize('peak', [None, (1e12, 'assumed')])
def test_the_speed_is_over_the_time_between_two_steps(peak, tmp_path, text, cache, monkeypatch):
  """The clock goes on by 1 s while a step is dispatched and by 5 s while it is logged, beside which the next one may run."""
  now, dispatch, log = [0.0], Steps.dispatch, Logbook.step
  monkeypatch.setattr(loop, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
  monkeypatch.setattr(loop, 'peak_flops', lambda devices: peak)
  monkeypatch.setattr(Steps, 'dispatch', lambda self: (now.__setitem__(0, now[0] + 1), dispatch(self))[1])
  monkeypatch.setattr(Logbook, 'step', lambda self, *args: (now.__setitem__(0, now[0] + 5), log(self, *args))[1])
  for last in (3, 0):  # a second process continues
    run(config(text, eval__every=6), tmp_path, cache, stop_at=last)
  raw = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  speeds = {line['step']: line for line in raw if 'loss' in line}
  assert [step for step, line in speeds.items() if 'tokens_per_second' not in line] == [1, 4]  # the first steps of the two compile
  for step in (2, 3, 5, 6, 8):
    assert 64 / 7 <= speeds[step]['tokens_per_second'] <= 64 / 5 and speeds[step].get('mfu', 0) < 1
    assert ('mfu' in speeds[step]) == (peak is not None)
  assert 64 / 2 <= speeds[7]['tokens_per_second'] <= 64  # after a validation nothing runs


def test_a_run_that_is_done_does_nothing(tmp_path, text, cache, capsys):
  settings = config(text, steps=4, eval__every=0, optimizer__warmup=4, optimizer__schedule='constant')
  lines = run(settings, tmp_path, cache)
  assert 'warning  the learning rate stays below its peak: optimizer.warmup is 4 steps, ' in capsys.readouterr().err
  assert run(settings, tmp_path, cache) == lines
  assert 'nothing to do: step 4 of 4 is done' in capsys.readouterr().err
  more = configs.override(settings, {'steps': 6})
  assert run(more, tmp_path, cache, accept_changes=True)[:4] == lines[:4]


def test_a_trace_ends_with_the_run_at_the_latest(tmp_path, text, cache):
  settings = config(text, eval__every=0)
  run(settings, tmp_path, cache, profile_steps=(3, 99), stop_at=4)
  assert any(path.endswith('.xplane.pb') for path in files_below(tmp_path))
  jax.profiler.start_trace(tmp_path / 'other')  # which would fail during another trace
  jax.profiler.stop_trace()
  with pytest.raises(UserError, match=r"^--profile_steps: '9:9', expected: a first step of at most 8"):
    run(settings, tmp_path, cache, profile_steps=(9, 9))
  run(settings, tmp_path, cache, profile_steps=(3, 4), stop_at=6)  # which the process before traced


def test_a_run_that_diverges_is_logged_and_keeps_the_best_checkpoint(tmp_path, text, cache):
  # At such a rate the second validation is of parameters that give no number.
  settings = config(text, eval__every=2, eval__rows=0, checkpoint__every=2, checkpoint__keep=1,
                    checkpoint__keep_best=True, faults__bad_step='skip')
  run(settings, tmp_path, cache, stop_at=2)
  lines = run(configs.override(settings, {'optimizer.peak_lr': 1e30}), tmp_path, cache, accept_changes=True)
  losses = [line['eval/valid/loss'] for line in lines if 'eval/valid/loss' in line]
  assert losses[0] > 0 and losses[1:] == [None, None, None]
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  assert checkpoints.steps() == [2, 8] and checkpoints.resolve('best') == 2


@pytest.mark.parametrize('values, message', [
  ({'batch_size': 6, 'mesh__data': 4}, 'batch_size: 6, expected: '),
  ({'batch_size': 8, 'microbatches': 2, 'mesh__data': 8}, 'batch_size: 8, expected: '),
  ({'mesh__data': 16}, 'mesh.data: 16, expected: '),
  ({'mesh__data': -1, 'mesh__model': 3}, 'mesh.model: 3, expected: '),
  ({'mesh__data': -1, 'mesh__model': 4}, 'mesh.model: 4, expected: '),
  ({'model__vocab_size': 5}, 'model.vocab_size: 5, expected: '),
  ({'data__source__path': 'nowhere.txt'}, "data.source.path: 'nowhere.txt', expected: "),
  ({'objective__kind': 'next_tokn'}, "objective.kind: 'next_tokn', expected: next_token, sft, "),
  ({'objective__kind': 'sft'}, "objective.kind: 'sft', expected: next_token for documents"),
  ({'data__context': 20_000}, 'data.context: 20000, expected: '),
  ({'optimizer__schedule': 'wsd', 'optimizer__decay': 9}, 'optimizer.decay: 9, expected: at most the 8 steps of the run'),
  ({'eval__prompt': 'Ä'}, "eval.prompt, character 0: 'Ä', expected: "),
])
def test_a_mistake_leaves_no_workdir(values, message, tmp_path, text, cache):
  with pytest.raises(UserError) as caught:
    train(config(text, **values), options(tmp_path / 'run', cache))
  assert str(caught.value).startswith(message) and not (tmp_path / 'run').exists()


def test_a_run_on_a_full_disk_continues_and_saves_when_there_is_space(tmp_path, text, cache, monkeypatch, capsys):
  monkeypatch.setattr(loop, 'RETRY', 0.01)
  settings = config(text, eval__every=0, checkpoint__every=2)
  straight = run(settings, tmp_path / 'straight', cache)
  with small_disk(tmp_path / 'disk', '700k') as disk:
    filler = disk / 'filler'
    said = Logbook.say

    def say(self, line):
      said(self, line)
      if line.startswith('not saved: ') and self.failures == 0:
        filler.unlink()
      self.failures -= line.startswith('not saved: ')

    monkeypatch.setattr(Logbook, 'say', say)
    monkeypatch.setattr(Logbook, 'failures', 2, raising=False)
    run(settings, disk / 'run', cache, stop_at=4)
    used = shutil.disk_usage(disk)
    filler.write_bytes(b'x' * (used.free - 20_000))
    assert run(settings, disk / 'run', cache) == straight
    assert capsys.readouterr().err.count('a disk with space left; trying again') >= 3
    assert Checkpoints(disk / 'run' / 'checkpoints').newest() == 8


def test_equal_failures_to_save_are_reported_less_and_less_often(monkeypatch):
  said, left = [], [20]
  monkeypatch.setattr(loop._Loop, '__init__', lambda self: None)
  one = loop._Loop()
  one.failures, one.interruptions = collections.Counter(), SimpleNamespace(save_in=lambda seconds: None)
  one.book = SimpleNamespace(say=said.append)

  def save():
    left[0] -= 1
    if left[0] >= 0:
      raise UserError('checkpoint', 'folder', 'a disk with space left')
    return True

  assert [one._attempt(save) for _ in range(21)] == [True] * 20 + [False]
  assert [line.rpartition('every 30 s')[2] for line in said[:-1]] == ['', *(f', {count} times so far' for count in (2, 4, 8, 16))]
  assert said[-1] == 'saved, after 20 failures'
  left[0] = 1
  one._attempt(save)
  assert said[-1].endswith('trying again every 30 s')


def test_a_run_whose_disk_stays_full_ends_with_one_line_and_keeps_what_it_had(tmp_path, text, cache, monkeypatch):
  monkeypatch.setattr(loop, 'RETRY', 0.01)
  settings = config(text, eval__every=0, checkpoint__every=2)
  with small_disk(tmp_path / 'disk', '700k') as disk:
    run(settings, disk / 'run', cache, stop_at=4)
    (disk / 'filler').write_bytes(b'x' * (shutil.disk_usage(disk).free - 20_000))
    with pytest.raises(UserError, match='a disk with space left'):
      run(settings, disk / 'run', cache)
    checkpoints = Checkpoints(disk / 'run' / 'checkpoints')
    assert checkpoints.steps() == [2, 4] and checkpoints.newest() == 4


def test_every_compiled_program_is_counted_once():
  counter, other = CompileCounter(), CompileCounter()
  double, triple = jax.jit(lambda x: 2 * x), jax.jit(lambda x: 3 * x)
  x = np.ones(3, np.float32)
  double(x), double(x), double(x + 1)
  assert counter.count == 1
  triple(x)
  double(np.ones(4, np.float32))  # another shape is another program
  assert counter.count == other.count == 3
  counter.close()
  triple(np.ones(5, np.float32))
  assert (counter.count, other.count) == (3, 4)
  other.close()
