"""Rewards of completions: functions (row, text) -> a number, or None for a text that cannot be judged.

A row has `prompt` and `answer`, texts of the data; `tokens`, the length of the completion; and `limit`, objective.max_tokens. A user's own
reward is such a function in the file that --reward_file names.
"""

import importlib.machinery
import math
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import Reward, UserError

RewardFunction = Callable[[Mapping[str, Any], str], float | None]
Rewards = Mapping[str, RewardFunction]
"""By the names in objective.rewards."""


def exact(row: Mapping[str, Any], text: str) -> float:
  """1 if the text is the answer, but for white space around it."""
  return float(text.strip() == row['answer'].strip())


def number(row: Mapping[str, Any], text: str) -> float:
  """1 if the text's result is that of the answer: see `result_of`. 0 if either has none."""
  ours, wanted = result_of(text), result_of(row['answer'])
  return float(ours is not None and wanted is not None and math.isclose(ours, wanted, rel_tol=1e-9, abs_tol=1e-9))


def length(row: Mapping[str, Any], text: str) -> float:
  """Minus the fraction of the limit of tokens that the text has."""
  return -row['tokens'] / row['limit']


_NUMBER = re.compile(r'(?:(?<![\w)])[-+\u2212])?[$€£]?[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))')
_FRACTION = re.compile(r'([-+\u2212]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}')


def result_of(text: str) -> float | None:
  """The result in an answer, as in GSM8K (arXiv:2110.14168): the first number after the last '####'; else that in the last \\boxed{};
  else the last number. Commas between thousands, currencies, units, signs and \\frac{}{} are understood. None: there is none."""
  text = text.replace('\\!', '').replace('{,}', ',').replace('\\$', '$').replace('\\,', '')
  if '####' in text:
    found, first = text.rpartition('####')[2], True
  else:
    boxes = re.findall(r'\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}', text)
    found, first = (boxes[-1], True) if boxes else (text, False)
  found = _FRACTION.sub(_quotient, found)
  numbers = [one for one in _NUMBER.findall(found) if any(map(str.isdigit, one))]
  if not numbers:
    return None
  plain = re.sub(r'[,$€£\s+]', '', numbers[0 if first else -1]).replace('\u2212', '-')
  return float(plain)


def _quotient(match: re.Match) -> str:
  try:
    return f' {match[1]}{float(match[2]) / float(match[3]):.12f} '
  except (ValueError, ZeroDivisionError):
    return match[0]


REWARDS: dict[str, RewardFunction] = {'exact': exact, 'number': number, 'length': length}
"""By their name in objective.rewards; format is made of its pattern."""


def make_rewards(rewards: Sequence[Reward], file: Path | None) -> dict[str, RewardFunction]:
  """The functions of a config's rewards. Raises a UserError for a name that is neither ours nor in the file, and for a file that fails."""
  own = _load(file) if file else {}
  found: dict[str, RewardFunction] = {}
  for reward in rewards:
    if reward.name == 'format':
      found['format'] = _format(re.compile(reward.pattern, re.DOTALL))
    elif reward.name in own or reward.name in REWARDS:
      found[reward.name] = own.get(reward.name) or REWARDS[reward.name]
    else:
      names = [*REWARDS, 'format', *own]
      more = '' if file else ', or a function in --reward_file'
      raise UserError('objective.rewards: name', reward.name, ', '.join(names) + more, names)
  return found


def _format(pattern: re.Pattern) -> RewardFunction:
  return lambda row, text: float(pattern.fullmatch(text.strip()) is not None)


def _load(file: Path) -> dict[str, RewardFunction]:
  """The public functions of a file of Python."""
  try:
    loader = importlib.machinery.SourceFileLoader('rewards_of_the_user', str(file))
    module = types.ModuleType(loader.name)
    sys.modules[loader.name] = module  # as dataclasses expect
    loader.exec_module(module)
  except Exception as error:
    raise UserError('--reward_file', str(file), f'a file of Python that can be imported ({type(error).__name__}: {error})') from error
  return {name: value for name, value in vars(module).items() if callable(value) and not name.startswith('_')}


def rewarded(functions: Rewards, row: Mapping[str, Any], text: str) -> dict[str, float]:
  """The value of each reward, NaN for None. Raises a UserError for a function that fails, or returns no number."""
  found = {}
  for name, function in functions.items():
    try:
      value = function(row, text)
      found[name] = math.nan if value is None else float(value)
      if value is not None and not math.isfinite(found[name]):
        raise ValueError(f'it is {value}')
    except Exception as error:
      raise UserError(f'reward {name}', text[:60], f'a number or None ({type(error).__name__}: {error})') from error
  return found
