"""Rewards judge texts as a person would."""

import math

import pytest

from gptjax.config import Reward, UserError
from gptjax.training.rewards import exact, length, make_rewards, number, result_of, rewarded

ANSWERS = {  # judged by hand
  'She has 5 apples.\n#### 5': 5, '#### 1,234': 1234, '#### 12,345,678 dollars': 12345678, '#### -7': -7, '####-7': -7, '#### $18': 18,
  '#### -$18': -18, '#### $-18': -18, '#### 3.50': 3.5, '#### .5': 0.5, '#### 40%': 40, '#### 10 km/h': 10, '#### \u22123': -3,
  '#### 7.': 7, '####  8 apples and 9 pears': 8, '#### €2,000.75': 2000.75, 'first #### 1 then #### 2': 2, '#### none': None,
  'The answer is 42.': 42, 'It costs $1,000, so $2,500 in all.': 2500, 'From 3 to 5': 5, 'Minus -4': -4, 'no number at all': None, '': None,
  'In 1999 he had 12': 12, '5 + 7 = 12': 12, '5-3=2': 2, '10 - 4': 4, 'x = 3.14159': 3.14159, '100,000': 100000, 'a, b, 1, 2': 2,
  r'\boxed{17}': 17, r'$\boxed{-17}$ is it, not 18': -17, r'\boxed{1{,}024}': 1024, r'\boxed{\frac{3}{4}}': 0.75,
  r'\boxed{-\dfrac{1}{2}} of 8': -0.5, r'\boxed{x = 5}': 5, r'so \frac{9}{3} = 3': 3, r'\boxed{\$30}': 30, r'\boxed{12\,000}': 12000,
  'about 1,5': 5, '1,2345': 2345, 'It is 1.5.': 1.5, '3/4': 4}


@pytest.mark.parametrize('text, value', ANSWERS.items())
def test_the_result_of_an_answer(text, value):
  assert result_of(text) == (value if value is None else pytest.approx(value))


def test_rewards():
  row = {'prompt': 'q', 'answer': 'so\n#### 1,200', 'tokens': 5, 'limit': 20}
  assert number(row, 'It is 1200.') == 1 and number(row, 'It is 120.') == number(row, 'It is.') == 0
  assert number({'answer': 'none'}, 'none') == 0 and exact({'answer': ' 7 '}, '7\n') == 1 and exact({'answer': '7'}, '07') == 0
  assert length(row, 'any') == -0.25
  shape, = make_rewards([Reward('format', pattern=r'\d+\.')], None).values()
  assert shape(row, ' 12. ') == 1 and shape(row, '12') == shape(row, 'so 12.') == 0


def test_the_rewards_of_a_users_file(tmp_path):
  file = tmp_path / 'mine.py'
  file.write_text('def short(row, text):\n  return len(text) < len(row["answer"])\ndef unsure(row, text):\n  return None\n'
                  'def broken(row, text):\n  return row["no_such"]\ndef wrong(row, text):\n  return "much"\n')
  found = make_rewards([Reward(name) for name in ('short', 'unsure', 'exact')], file)
  values = rewarded(found, {'prompt': '', 'answer': 'abc'}, 'ab')
  assert (values['short'], values['exact']) == (1.0, 0.0) and math.isnan(values['unsure'])
  for name, words in (('broken', r'reward broken: .*KeyError'), ('wrong', r'reward wrong: .*ValueError')):
    with pytest.raises(UserError, match=words):
      rewarded(make_rewards([Reward(name)], file), {'answer': ''}, 'text')
  with pytest.raises(UserError, match="objective.rewards: name: 'shrt', .*did you mean short"):
    make_rewards([Reward('shrt')], file)
  with pytest.raises(UserError, match="name: 'exactly', expected: exact, number, length, format, or a function in --reward_file; did"):
    make_rewards([Reward('exactly')], None)
  for text, words in (('def', 'SyntaxError'), ('import no_such_module', 'ModuleNotFoundError'), ('1 / 0', 'ZeroDivisionError')):
    file.write_text(text)
    with pytest.raises(UserError, match=f'--reward_file: .*mine.py.*{words}'):
      make_rewards([Reward('exact')], file)
  with pytest.raises(UserError, match='--reward_file: .*FileNotFoundError'):
    make_rewards([Reward('exact')], tmp_path / 'none.py')
  with pytest.raises(UserError, match='pattern'):
    Reward('format', pattern='(')
