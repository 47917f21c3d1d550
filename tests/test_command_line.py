"""The commands, as a user types them: train, evaluate, generate, and what they say to a mistake."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT, run_module
from tiny import files_below, write_text

from gptjax import config as configs
from gptjax import files

CACHE = ROOT / '.jax_cache' / 'commands'
"""Compiled programs are found again only where the cache lies in the same place."""

RECIPE = """
from gptjax.config import *

def get_config():
  return Config(
    model=ModelConfig(layers=1, heads=2, width=16),
    data=DataConfig(source=SourceConfig({text!r}), context=16, tokenizer=TokenizerConfig(kind='chars')),
    optimizer=OptimizerConfig(warmup=2), eval=EvalConfig(every=3, sample_tokens=5), steps=6, batch_size=4)
"""


def call(name, *flags, given=''):
  return run_module(f'gptjax.{name}', *flags, given=given)


@pytest.fixture(scope='module')
def home(tmp_path_factory):
  """A folder with a text and a recipe."""
  folder = tmp_path_factory.mktemp('home')
  text = write_text(folder / 'text.txt')
  (folder / 'recipe.py').write_text(RECIPE.format(text=str(text)))
  shutil.rmtree(CACHE / 'data', ignore_errors=True)
  return folder


@pytest.fixture(scope='module')
def trained(home):
  """The workdir of a run on two virtual devices, and what the command wrote."""
  done = call('train', f'--config={home}/recipe.py', f'--workdir={home}/run', f'--cache_dir={CACHE}', '--cpu_devices=2',
              '--log_every=2', '--profile_steps=2:3', '--config.optimizer.peak_lr=0.03')
  assert done.returncode == 0, done.stderr
  return home / 'run', done


def lines_of(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_train_makes_a_run(trained):
  workdir, done = trained
  assert done.stdout == '' and 'Traceback' not in done.stderr
  assert [line['step'] for line in lines_of(workdir)] == [1, 2, 3, 4, 6, 6]
  config = configs.from_json((workdir / 'config.json').read_text())
  assert config.optimizer.peak_lr == 0.03 and config.model.width == 16
  header = json.loads((workdir / 'run.json').read_text())
  assert 'data 2 x model 1' in header['mesh'] and 'warning' not in header
  assert any(path.endswith('.xplane.pb') for path in files_below(workdir / 'profile'))


def test_evaluate_ends_with_one_json_object(trained, home):
  workdir, _ = trained
  before = set(files_below(workdir))
  done = call('evaluate', f'--workdir={workdir}', f'--cache_dir={CACHE}')  # on one device
  assert done.returncode == 0 and 'Traceback' not in done.stderr
  score = json.loads(done.stdout.splitlines()[-1])
  assert {*score} == {'loss', 'perplexity', 'bits_per_byte', 'tokens', 'bytes', 'step', 'sets', 'tags'} and score['step'] == 6
  final = lines_of(workdir)[-1]
  for name in ('loss', 'perplexity', 'bits_per_byte'):
    np.testing.assert_allclose(score[name], final[f'eval/valid/{name}'], rtol=1e-5)
  kept = json.loads((workdir / 'evaluation.json').read_text())
  assert score.items() <= kept.items() and {*kept['baselines']} == {'gzip -9', 'xz -9'}
  assert set(files_below(workdir)) - before == {'evaluation.json'}


def test_scores_are_not_lost_to_what_can_be_known_before(trained, tmp_path):
  workdir = shutil.copytree(trained[0], tmp_path / 'run')
  evaluate = lambda *flags: call('evaluate', f'--workdir={workdir}', f'--cache_dir={CACHE}', *flags)
  (workdir / 'evaluation.json').write_text('{"step": 6, "lo')
  done = evaluate()
  assert done.returncode == 2 and done.stderr.startswith(f'error: {workdir}/evaluation.json: ') and done.stderr.count('\n') == 1
  (workdir / 'evaluation.json').unlink()
  (workdir / 'evaluation.json.partial').mkdir()
  done = evaluate()
  assert done.returncode == 2 and done.stderr.startswith(f"error: --workdir: '{workdir}/evaluation.json', expected: a file that can be")
  done = call('generate', f'--workdir={workdir}', f'--out={workdir}/evaluation.json', f'--cache_dir={CACHE}')
  assert done.returncode == 2 and done.stderr.startswith("error: --out: ") and done.stderr.count('\n') == 1
  (workdir / 'evaluation.json.partial').rmdir()
  damaged = shutil.copytree(workdir / 'checkpoints' / '6', workdir / 'checkpoints' / '7')
  (damaged / 'config.json').write_text('{}')
  done = evaluate('--step=all')  # what was scored before is printed and written
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: checkpoint: '{damaged}', ")
  scored = [json.loads(line) for line in (workdir / 'evaluations.jsonl').read_text().splitlines()]
  assert [one['step'] for one in scored] == [6] and json.loads(done.stdout.splitlines()[-1])['loss'] == scored[0]['loss']


def test_results_that_cannot_be_written_are_printed(tmp_path, monkeypatch, capsys):
  def full(path, text):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(files, 'write_atomic', full)
  with pytest.raises(OSError, match='No space left'):
    files.write_results(tmp_path / 'out.jsonl', 'line\n')
  assert capsys.readouterr().out == 'line\n'


def test_generate_streams_the_same_text_for_the_same_seed(trained, home):
  workdir, _ = trained
  flags = (f'--workdir={workdir}', f'--cache_dir={CACHE}', '--prompt=the cat', '--max_tokens=120',
           '--top_k=8')  # the end of the text is not among the 8 likeliest
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL}
  with subprocess.Popen([sys.executable, '-m', 'gptjax.generate', *flags, '--seed=1'], **pipes, cwd=ROOT) as process:
    pieces = [*iter(lambda: os.read(process.stdout.fileno(), 4096), b'')]
  assert len(pieces) > 10  # as they came, not all at the end
  streamed = b''.join(pieces).decode()
  again, other = (call('generate', *flags, f'--seed={seed}') for seed in (1, 2))
  assert streamed == again.stdout and streamed != other.stdout
  for text in (streamed, other.stdout):
    assert text.startswith('the cat') and text.endswith('\n') and len(text) == len('the cat') + 120 + 1


def test_print_config_and_help_start_nothing(home):
  shown = call('train', f'--config={home}/recipe.py', '--config.steps=3 epochs', '--print_config')
  fields = dict(line.partition('  #')[0].split(' = ', 1) for line in shown.stdout.splitlines())
  assert shown.returncode == 0 and shown.stderr == '' and {*fields} == {*configs.flatten(configs.Config())}
  assert (fields['steps'], fields['model.width'], fields['seed']) == ("'3 epochs'", '16', '0')
  told = call('train', f'--config={home}/recipe.py', '--help')
  assert told.returncode == 0 and told.stderr == ''
  for flag in ('--config.model.width=16', '--workdir', '--stop_at', '--profile_steps', '--cpu_devices', '--cache_dir'):
    assert f'  {flag}' in told.stdout
  assert '--config' not in call('evaluate', '--help').stdout


@pytest.mark.parametrize('flags, message', [
  (['--config=configs/defautl.py'], "--config: 'configs/defautl.py', expected: "),
  (['--config.model.widht=8'], "--config.model.widht: '8', expected: "),
  (['--config.batch_size=many'], "--config.batch_size: 'many', expected: an integer"),
  (['--config.zero_stage=4'], 'zero_stage: 4, expected: 0, 1, 2 or 3'),
  (['--config.batch_size=4', '--cpu_devices=8'], 'batch_size: 4, expected: a multiple of mesh.data=8: 8'),
  (['--config.data.source.path=nowhere/text.txt'], "data.source.path: 'nowhere/text.txt', expected: "),
  (['--workdir=gs://bucket/run'], "--workdir: 'gs://bucket/run', expected: a path on this machine"),
  (['--cache_dir=a**b'], "--cache_dir: 'a**b', expected: a path without '**'"),
  (['--profile_steps=3:2'], "--profile_steps: '3:2', expected: "),
  (['--stop_at=-1'], "--stop_at: '-1', expected: "),
  (['steps=3'], "argument: 'steps=3', expected: "),
])
def test_a_mistake_in_training_is_one_line_and_leaves_nothing(flags, message, home, tmp_path):
  given = {flag.partition('=')[0] for flag in flags}
  places = (flag for flag in (f'--workdir={tmp_path}/run', f'--cache_dir={CACHE}') if flag.partition('=')[0] not in given)
  done = call('train', *(f'--config={home}/recipe.py',) * ('--config' not in given), *places, *flags)
  told = [line for line in done.stderr.splitlines() if not line.startswith('tokenizing for ')]
  assert len(told) == 1 and told[0].startswith(f'error: {message}'), done.stderr
  assert (done.returncode, done.stdout) == (2, '') and not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name, flags, message', [
  ('evaluate', [], '--workdir: None, expected: '),
  ('evaluate', ['--workdir={home}/nothing'], "--workdir: '{home}/nothing', expected: "),
  ('evaluate', ['--workdir={home}/run', '--step=99'], "--step: '99', expected: latest, best, 6"),
  ('evaluate', ['--workdir={home}/run', '--sets=others'], "--sets: 'others', expected: valid; or NAME=STORE"),
  ('generate', ['--workdir={home}/run', r'--prompt=the\nÄ'], "--prompt, character 4: 'Ä', expected: "),
])
def test_a_mistake_with_a_trained_model_is_one_line(name, flags, message, trained, home):
  before = files_below(home)
  done = call(name, f'--cache_dir={CACHE}', *(flag.format(home=home) for flag in flags))
  told = [line for line in done.stderr.splitlines() if not line.startswith('restored ')]
  assert len(told) == 1 and told[0].startswith('error: ' + message.format(home=home)), done.stderr
  assert done.returncode == 2 and files_below(home) == before
