"""Every mistake of a sweep is one line before a trial starts, and trials have names that stay."""

import random

import pytest
from commands import run_module

from gptjax.config import UserError, flatten
from gptjax.config.fields import FIELDS
from gptjax.sweeps import load_sweep, make_trials

HEAD = 'from gptjax.sweeps import *\nfrom gptjax.sweeps import Sweep, Adaptive, Halving\n'


def load(folder, body, head=HEAD):
  path = folder / 'sweep.py'
  path.write_text(f'{head}def get_sweep():\n  {body}\n')
  sweep = load_sweep(path)
  return make_trials(sweep, sweep.points, path)


def test_trials_are_the_recipe_with_their_overrides(tmp_path):
  trials = load(tmp_path, "return Sweep('configs/default.py', product(values('optimizer.peak_lr', 1e-3, 2e-3), seeds(2)), "
                "overrides={'steps': 7, 'seed': 5})")
  assert [trial.point for trial in trials] == [{'optimizer.peak_lr': rate, 'seed': seed} for rate in (1e-3, 2e-3) for seed in (0, 1)]
  for trial in trials:
    found = flatten(trial.config)
    assert all(found[name] == value for name, value in {'steps': 7, **trial.point}.items())
  assert len({trial.name for trial in trials}) == 4 and trials[0].name.startswith('peak_lr=0.001,seed=0-')
  longer = load(tmp_path, "return Sweep('configs/default.py', product(values('optimizer.peak_lr', 1e-3, 2e-3, 3e-3), seeds(2)), "
                "overrides={'steps': 7, 'seed': 5})")
  assert {trial.name for trial in trials} < {trial.name for trial in longer}
  other = load(tmp_path, "return Sweep('configs/default.py', [{'model.width': 48, 'data.source.path': 'a b/ü' * 40}])")
  assert other[0].name.isascii() and len(other[0].name) < 120 and ' ' not in other[0].name and '/' not in other[0].name


def test_names_depend_on_values_that_are_not_the_defaults(tmp_path):
  (tmp_path / 'recipe.py').write_text('from gptjax.config import Config\nget_config = Config\n')
  names = [trial.name for trial in load(tmp_path, f"return Sweep('{tmp_path}/recipe.py', [{{}}, {{'seed': 0}}, {{'seed': 3}}])")]
  # Fixed: later versions, which have more fields, must find the trials of earlier ones.
  assert names == ['44136fa355', 'seed=3-1391dc1f10']


def test_points_that_mean_the_same_are_one_trial(tmp_path):
  points = "[{'seed': 0}, {'seed': 0, 'steps': 9}, {}]"
  assert len(load(tmp_path, f"return Sweep('configs/default.py', {points}, overrides={{'steps': 9}})")) == 1


@pytest.mark.parametrize('body, words', [
  ("return Sweep('configs/default.py', [{'modl.width': 3}])", "sweep.py: modl.width: 3, expected: .*did you mean model.width"),
  ("return Sweep('configs/default.py', [{}, {'model.width': 'x'}, {'model.width': -1}])",
   "model.width: 'x', expected: an integer; 2 of 3 trials are wrong"),
  ("return Sweep('configs/default.py', [{'model.heads': 7}])", 'model.heads: 7, expected'),
  ("return Sweep('configs/nothing.py', [{}])", "--config: 'configs/nothing.py'"),
  ("return Sweep('configs/default.py', [])", 'points: .*a list of one or more points'),
  ("return Sweep('configs/default.py', {'a': 1})", 'points: .*a list of one or more points|sweep.py:4: TypeCheckError'),
  ("return Sweep('configs/default.py', [{}], halving=Halving([]))", r'halving: .rungs \[\], reduction 4'),
  ("return Sweep('configs/default.py', [{}], halving=Halving([9, 3]))", 'in ascending order'),
  ("return Sweep('configs/default.py', seeds(4), overrides={'steps': 9}, metric='loss', halving=Halving([9]))", 'steps below'),
  ("return Sweep('configs/default.py', seeds(4), overrides={'steps': 9, 'eval.every': 2}, halving=Halving([3]))", 'of eval.every=2'),
  ("return Sweep('configs/default.py', Adaptive(4, {'model.width': Choice(8)}), halving=Halving([3]))", 'one of both'),
  ("return Sweep('configs/default.py', Adaptive(0, {}))", 'a number of points above 0'),
  ("return Sweep('configs/default.py', Adaptive(3, {'seed': [1, 2]}))", 'a space of Uniform|TypeCheckError'),
  ("return Sweep('configs/default.py', [{}, {'seed': 1}], metric='loss', halving=Halving([5], 3))", '2 points., expected: 3 or more'),
  ("return Sweep('configs/default.py', [{}], halving=(100,))", 'Halving of a list of steps|TypeCheckError'),
  ("return Sweep('configs/default.py', [{}], halving=Halving(100))", 'Halving of a list of steps|TypeCheckError'),
  ("return Sweep('configs/default.py', Adaptive(3, {'modl.width': Choice(3)}))", 'points: modl.width.*did you mean model.width'),
  ("return Sweep('configs/default.py', Adaptive(3, {'model.width': Choice(8, 'x')}))", "points: model.width: 'x', expected: an integer"),
  ("return Sweep('configs/default.py', Adaptive(3, {'model.width': Uniform(8, 64)}))", 'points: model.width: 8.0, expected: an integer'),
  ("return Sweep('configs/default.py', [{}], metric='eval/vaild/loss')", "metric: 'eval/vaild/loss', expected: eval/NAME.*mean valid"),
  ("return Sweep('configs/default.py', [{}], overrides=None)", 'overrides: .*field: value|TypeCheckError'),
  ("return Sweep('configs/default.py', [{1: 2}])", 'a list of one or more points|TypeCheckError'),
  ("return Sweep(None, [{}])", 'the path of a recipe|TypeCheckError'),
  ("return Sweep('configs/default.py', draws(3, {'seed': Uniform(0.5, 3, integer=True)}))", 'whole numbers'),
  ('return 3', r"get_sweep\(\): 'int', expected: a gptjax.sweeps.Sweep"),
  ('return Sweep(', 'sweep.py:4: .*expected: a sweep whose get_sweep'),
  ('return 1 / 0', 'sweep.py:4: .*division by zero'),
  ('return product(values("a", 1), values("a", 2))', 'a field in one of the parts')])
def test_mistakes(body, words, tmp_path):
  with pytest.raises(UserError, match=words) as caught:
    load(tmp_path, body)
  assert '\n' not in str(caught.value)


@pytest.mark.full
def test_three_hundred_broken_sweeps_are_one_line_each(tmp_path):
  generator, names = random.Random(0), list(FIELDS)
  wrong = {'unknown': lambda: {generator.choice(names) + generator.choice('xyz_'): 1}, 'type': lambda: {generator.choice(names): object},
           'limit': lambda: {generator.choice(['model.layers', 'batch_size', 'steps', 'data.context', 'optimizer.peak_lr']): -3},
           'pair': lambda: {'model.heads': 7, 'model.width': 64 + generator.randrange(6)},
           'text': lambda: {generator.choice(['model.width', 'seed', 'microbatches']): 'many'},
           'part': lambda: {generator.choice(['model', 'data', 'optimizer.']): 1}}
  for number in range(300):
    kind = generator.choice(list(wrong))
    points = [{}] * generator.randrange(3) + [wrong[kind]()]
    (tmp_path / 'sweep.py').write_text(f'from gptjax.sweeps import Sweep\ndef get_sweep():\n  return Sweep("configs/default.py", '
                                       f'{str(points).replace(str(object), "object")})\n')
    with pytest.raises(UserError) as caught:
      sweep = load_sweep(tmp_path / 'sweep.py')
      make_trials(sweep, sweep.points, tmp_path / 'sweep.py')
    assert '\n' not in str(caught.value) and 'expected: ' in str(caught.value), (number, points)


@pytest.mark.full
def test_the_command_says_so_in_one_line_and_makes_nothing(tmp_path):
  (tmp_path / 'sweep.py').write_text(f'{HEAD}def get_sweep():\n  return Sweep("configs/default.py", [{{"x": 1}}])\n')
  done = run_module('gptjax.sweep', f'--sweep={tmp_path}/sweep.py', f'--out={tmp_path}/out')
  assert done.returncode == 2 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1 and not (tmp_path / 'out').exists()
  (tmp_path / 'sweep.py').write_text(f'{HEAD}def get_sweep():\n  return Sweep("configs/default.py", [{{}}])\n')
  for flags, words in (('--train_flags=--stop_at=5', '--train_flags: '), ("--train_flags='", 'No closing quotation'),
                       (f'--out={tmp_path}/sweep.py', '--out: ')):
    done = run_module('gptjax.sweep', f'--sweep={tmp_path}/sweep.py', *([] if 'out' in flags else [f'--out={tmp_path}/out']), flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1, done.stderr
  done = run_module('gptjax.sweep', f'--sweep={tmp_path}/none.py', f'--out={tmp_path}/out')
  assert done.returncode == 2 and 'a Python file with get_sweep()' in done.stderr
