"""The analysis of a sweep's CSV: what it counts, prints, draws and predicts, and one line for each mistake."""

import csv
import json

import numpy as np
import pytest
from commands import run_module
from documented import ROOT, commands_of, run

from experiments.scaling_law.fit import Law
from experiments.scaling_law.trials import counted, read
from gptjax.config import Config, UserError, override, to_json
from gptjax.model import flops_per_token, parameter_count

LAW = Law(E=1.5, A=60.0, B=400.0, alpha=0.3, beta=0.35)
RECIPE = override(Config(), {'model.vocab_size': 65, 'data.context': 64, 'batch_size': 4})
MODELS = [{'model.layers': 1, 'model.width': width} for width in (16, 32, 64, 128)]
BUDGETS = (1e10, 4e10, 16e10)


def sweep(path, models=MODELS, change=lambda row: row):
  """Writes a CSV as a sweep has it: for each budget and model the steps that it pays, and the loss by the law."""
  rows = []
  for budget in BUDGETS:
    for model in models:
      config = override(RECIPE, model)
      steps = round(budget / flops_per_token(config.model, 64) / 64 / 4)
      n, d, _ = counted(override(config, {'steps': steps}), '')
      loss = LAW.loss(np.array([n]), np.array([d]))[0]
      rows.append(change({'trial': len(rows), **model, 'steps': steps, 'batch_size': 4, 'step': steps, 'loss': loss - 0.1,
                          'eval/valid/loss': loss}))
  with path.open('w', newline='') as file:
    lines = csv.DictWriter(file, rows[0])
    lines.writeheader()
    lines.writerows(rows)
  return rows


def recipe(folder):
  path = folder / 'recipe.py'
  path.write_text('from gptjax.config import *\n'
                  "get_config = lambda: override(Config(), {'model.vocab_size': 65, 'data.context': 64, 'batch_size': 4})\n")
  return path


def test_the_command_prints_and_draws_the_law_and_predicts(tmp_path):
  sweep(tmp_path / 'trials.csv')
  larger = {'model.layers': 1, 'model.width': 192, 'steps': 1000, 'batch_size': 4}
  done = run_module('experiments.scaling_law.analyse', f'--trials={tmp_path}/trials.csv', f'--recipe={recipe(tmp_path)}',
                    f'--picture={tmp_path}/law.png', f'--predict={json.dumps(larger)}', '--resamples=40')
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[0] == '12 runs; left out, without a loss or their last steps, or short: 0'
  printed = {line[:32].strip(): line[32:].split() for line in lines[5:] if line}
  for name, value in vars(LAW).items():
    assert float(printed[name][0]) == pytest.approx(value, rel=0.01) and printed[name][2] == 'to'
  largest = read(tmp_path / 'trials.csv', RECIPE).compute.max()
  best = [float(printed[f'best {name} for C = 6 N D = {largest:.3g}'][0]) for name in 'ND']
  assert best == pytest.approx(LAW.optimum(largest), rel=0.02)
  assert sum('(4 runs)' in line for line in lines) == 3
  last, n, d, c = json.loads(lines[-1]), *counted(override(RECIPE, larger), '')
  assert last['eval/valid/loss'] == pytest.approx(LAW.loss(np.array([n]), np.array([d]))[0], abs=2e-3)
  assert last['low'] <= last['eval/valid/loss'] <= last['high']
  assert (last['fields'], last['parameters'], last['tokens'], last['flops']) == (larger, n, d, c)
  assert (tmp_path / 'law.png').read_bytes().startswith(b'\x89PNG')


def test_runs_are_counted_by_their_overridden_fields(tmp_path):
  rows = sweep(tmp_path / 'trials.csv', MODELS[:1])
  found = read(tmp_path / 'trials.csv', RECIPE)
  config = override(RECIPE, MODELS[0])
  assert {*found.parameters} == {parameter_count(config.model, 64)}
  assert found.tokens.tolist() == [row['steps'] * 4 * 64 for row in rows]
  assert found.compute == pytest.approx(found.tokens * flops_per_token(config.model, 64))
  assert found.compute == pytest.approx(BUDGETS, rel=0.02)
  assert found.loss == pytest.approx([row['eval/valid/loss'] for row in rows])
  assert read(tmp_path / 'trials.csv', RECIPE, 'loss').loss == pytest.approx(found.loss - 0.1)


def test_durations_in_tokens_and_empty_fields_are_those_of_the_recipe(tmp_path):
  sweep(tmp_path / 'trials.csv', MODELS[:1], lambda row: row | {'steps': '', 'step': 20})
  found = read(tmp_path / 'trials.csv', override(RECIPE, {'steps': '5000 tokens'}))
  assert found.tokens.tolist() == [5120] * 3  # 20 steps


def test_runs_that_have_not_ended_are_left_out(tmp_path):
  ends = iter([{'step': 5}, {'eval/valid/loss': '', 'step': ''}, {}])
  sweep(tmp_path / 'trials.csv', MODELS[:1], lambda row: row | next(ends))
  found = read(tmp_path / 'trials.csv', RECIPE)
  assert len(found.loss) == len(found.compute) == 1 and found.left_out == 2


def test_short_runs_are_left_out(tmp_path):
  steps = sorted(row['steps'] for row in sweep(tmp_path / 'trials.csv', MODELS[:1]))
  found = read(tmp_path / 'trials.csv', RECIPE, least_steps=steps[1])
  assert found.tokens.tolist() == [one * 4 * 64 for one in steps[1:]] and found.left_out == 1


@pytest.mark.parametrize('change, options, error', [
  (lambda row: row | {'eval/valid/loss': 'nan'}, {}, "trials.csv:2: eval/valid/loss: 'nan', expected: a finite number above 0"),
  (lambda row: row | {'eval/valid/loss': 'inf'}, {}, "trials.csv:2: eval/valid/loss: 'inf', expected: a finite number above 0"),
  (lambda row: row | {'eval/valid/loss': 'low'}, {}, "trials.csv:2: eval/valid/loss: 'low', expected: a finite number above 0"),
  (lambda row: row | {'model.width': 17}, {}, 'model.heads: 4, expected: a divisor of model.width=17'),
  (lambda row: row | {'model.width': 'wide'}, {}, "trials.csv:2: model.width: 'wide', expected: an integer"),
  (lambda row: row | {'step': row['steps'] + 1}, {}, 'expected: at most steps='),
  (lambda row: row | {'steps': '2 epochs'}, {}, "trials.csv:2: steps: '2 epochs', expected: steps or tokens"),
  (lambda row: row, {'measured': 'eval/vald/loss'}, 'expected: a table with a column eval/vald/loss; did you mean eval/valid/loss?'),
  (lambda row: row, {'recipe': Config()}, 'trials.csv:2: model.vocab_size: 0, expected: the number of token ids')])
def test_a_mistake_in_a_table_is_one_line(tmp_path, change, options, error):
  sweep(tmp_path / 'trials.csv', MODELS[:1], change)
  with pytest.raises(UserError) as raised:
    read(tmp_path / 'trials.csv', **{'recipe': RECIPE, **options})
  assert error in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.parametrize('text, error', [
  (b'', "trials.csv: '', expected: a table with a column eval/valid/loss"),
  (b'trial,eval/valid/loss\n1,2,3\n', "trials.csv:2: '1,2', expected: 2 columns"),
  (b'trial,eval/valid/loss\n1\n', "trials.csv:2: '1', expected: 2 columns"),
  (b'trial,eval/valid/loss\n\xff,2\n', 'expected: a CSV file in UTF-8'),
  (b'trial,eval/valid/loss\n"a"b,2\n', 'expected: a CSV file in UTF-8')])
def test_a_file_that_is_no_table_is_one_line(tmp_path, text, error):
  (tmp_path / 'trials.csv').write_bytes(text)
  with pytest.raises(UserError) as raised:
    read(tmp_path / 'trials.csv', RECIPE)
  assert error in str(raised.value)


@pytest.mark.full
@pytest.mark.parametrize('flags, error', [
  (['--trials=nowhere.csv'], 'nowhere.csv'), (['--picture=law.jpg'], "--picture: 'law.jpg', expected: a file that ends in .png"),
  (['--predict={"model.layers": 1, "model.width": 9, "steps": 9, "batch_size": 1, "modl": 256}'], '--predict: modl: 256, expected: '),
  (['--predict={"model.width": 256, "batch_size": 4}'], 'every field that the sweep varies; not there: model.layers, steps'),
  (['--predict=256'], "--predict: '256', expected: a JSON object"), (['--resamples=1'], "--resamples: '1', expected: "),
  ([], 'runs: 3, expected: 6 or more: the law has five constants'),
  (['--recipe=configs/nothing.py'], "--recipe: 'configs/nothing.py', expected: a recipe")])
def test_a_mistake_in_the_command_is_one_line(tmp_path, flags, error):
  sweep(tmp_path / 'trials.csv', MODELS[:1])
  given = {'trials': f'{tmp_path}/trials.csv', 'recipe': recipe(tmp_path)} | dict(one[2:].split('=', 1) for one in flags)
  done = run_module('experiments.scaling_law.analyse', *(f'--{name}={value}' for name, value in given.items()))
  assert done.returncode == 2 and done.stderr.count('\n') == 1 and done.stderr.startswith('error: ') and error in done.stderr, done.stderr


@pytest.mark.full
def test_commands_of_the_page_run_as_written(tmp_path):
  (tmp_path / 'sweeps/NAME/trials/TRIAL').mkdir(parents=True)
  fixed = ('model.layers', 'batch_size')
  sweep(tmp_path / 'sweeps/NAME/trials.csv', change=lambda row: {name: value for name, value in row.items() if name not in fixed})
  (tmp_path / 'sweeps/NAME/trials/TRIAL/config.json').write_text(to_json(override(RECIPE, MODELS[0])))
  commands = [one for one in commands_of('experiments/scaling_law/README.md') if '=sweeps/NAME/' in one]
  first, second = run([f'{command} --resamples=40' for command in commands], tmp_path).values()
  assert second.startswith(first.rstrip()) and json.loads(second.splitlines()[-1])['fields'] == {'model.width': 256, 'steps': 4000}
  assert (tmp_path / 'scaling.png').read_bytes().startswith(b'\x89PNG')


def test_every_experiment_is_in_the_table_with_its_question_and_answer():
  table = [line.split('|') for line in (ROOT / 'experiments/README.md').read_text().splitlines() if line.startswith('| [')]
  pages = [path.parent.name for path in sorted((ROOT / 'experiments').glob('*/README.md'))]
  assert [row[1].strip() for row in table] == [f'[{name}]({name}/README.md)' for name in pages]
  assert all(row[2].strip().endswith('?') and row[3].strip() for row in table)
