"""Lengths of training in steps, tokens or epochs."""

import math
import re
from typing import Annotated

from gptjax.config.checks import Limit, UserError

Duration = int | str
"""A length of training: steps (2000), or text with a unit: '2000 steps', '1.5e6 tokens', '3 epochs'."""
DURATIONS = "a count of steps (2000), or one with its unit: '1.5e6 tokens', '3 epochs'"
"""Description of valid durations, for an error."""

_DURATION = re.compile(r'\s*([0-9]+(?:_[0-9]+)*\.?[0-9]*(?:e[+]?[0-9]+)?)\s*(?:(step|token|epoch)s?)?\s*', re.IGNORECASE)


def _amount_and_unit(value: Duration) -> tuple[float, str]:
  """Returns for example (1.5e6, 'token'); an infinite amount if the value is not a Duration."""
  match = _DURATION.fullmatch(str(value))
  amount, unit = (float(match[1]), (match[2] or 'step').lower()) if match else (math.inf, '')
  return (math.inf, '') if unit == 'step' and amount % 1 else (amount, unit)


def duration_in_steps(field: str, value: Duration, *, batch_size: int, context: int, rows_per_epoch: int) -> int:
  """A Duration in optimizer steps, rounded up; a step has batch_size * context tokens, and an epoch rows_per_epoch rows."""
  amount, unit = _amount_and_unit(value)
  if math.isinf(amount * rows_per_epoch):
    raise UserError(field, value, DURATIONS)
  steps = {'step': amount, 'token': amount / (batch_size * context), 'epoch': amount * rows_per_epoch / batch_size}[unit]
  return math.ceil(steps - 1e-9)


def in_unit_of_steps(value: Duration) -> bool:
  """Whether a Duration is in steps, so that its number of tokens depends on the batch size."""
  return _amount_and_unit(value)[1] == 'step'


DurationField = Annotated[Duration, Limit(lambda value: math.isfinite(_amount_and_unit(value)[0]), DURATIONS)]
"""Type of a field that holds a Duration."""
