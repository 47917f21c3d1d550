"""Groups of trials over seeds, and their intervals."""

import numpy as np
import pytest
from scipy import stats

from experiments.runs import Groups, interval, label, read, table, told
from gptjax.config import UserError

TABLE = ('trial,status,optimizer.name,optimizer.peak_lr,seed,step,loss,eval/valid/loss,seconds\n'
         'a,done,adamw,0.001,0,10,2.5,2.0,3\nb,done,adamw,0.001,1,10,2.4,2.2,3\nc,done,muon,,0,10,2.3,1.5,3\nd,done,muon,,1,10,2.2,1.8,3\n')


def test_groups_have_means_and_differences_over_seeds(tmp_path):
  (tmp_path / 'trials.csv').write_text(TABLE)
  groups = Groups(read(tmp_path / 'trials.csv'))
  assert [*groups] == ['name=adamw, peak_lr=0.001', 'name=muon'] and groups.best('eval/valid/loss') == 'name=muon'
  mean, half = groups.difference('name=muon', 'name=adamw, peak_lr=0.001', 'eval/valid/loss')
  assert mean == pytest.approx(-0.45) and half == pytest.approx(stats.t.ppf(0.975, 1) * 0.05)
  assert [*Groups(read(tmp_path / 'trials.csv'), ['optimizer.name'])] == ['name=adamw', 'name=muon']
  with pytest.raises(UserError, match='recipe: .*two runs with seed 0'):
    Groups(read(tmp_path / 'trials.csv'), [])
  assert label({}) == 'recipe' and told((1.23456, float('nan')), 2) == '1.23' and told((1.23456, 0.5), 2) == '1.23 ± 0.50'
  assert table(['a', 'b'], [['1', '2']]) == '| a | b |\n| --- | --- |\n| 1 | 2 |'


def test_an_interval_covers_the_mean_as_often_as_it_says():
  draws = np.random.default_rng(0).normal(3, 2, (2000, 3))
  found = [interval(some) for some in draws]
  assert np.mean([abs(mean - 3) <= half for mean, half in found]) == pytest.approx(0.95, abs=0.015)
  assert np.isnan(interval([1.0])[1])


@pytest.mark.parametrize('change, message', [
  (lambda text: text.replace('d,done', 'd,failed'), '1 trials that are not done, d for one'),
  (lambda text: 'a,b\n1,2\n', "trials.csv: .a, b., expected: a sweep's trials.csv"),
  (lambda text: '', "trials.csv: '', expected: a sweep's trials.csv")])
def test_a_wrong_table_is_reported(tmp_path, change, message):
  (tmp_path / 'trials.csv').write_text(change(TABLE))
  with pytest.raises(UserError, match=message):
    read(tmp_path / 'trials.csv')
