"""Checks that several configs share. `prefix` is that of the fields' names in errors."""

import math

from gptjax.config.errors import UserError

INT32_MAX = 2**31 - 1
"""Devices count steps, ids and positions in int32."""


def at_least(prefix: str, config: object, lowest: float, *names: str) -> None:
  """Raises a UserError where a field is below a limit."""
  for name in names:
    value = getattr(config, name)
    if value < lowest:
      raise UserError(f'{prefix}{name}', value, f'{lowest} or more')


def at_most(prefix: str, config: object, highest: int, *names: str) -> None:
  """Raises a UserError where a field is above a limit."""
  for name in names:
    value = getattr(config, name)
    if value > highest:
      raise UserError(f'{prefix}{name}', value, f'{highest} or less')


def fraction(prefix: str, config: object, *names: str) -> None:
  """Raises a UserError where a field is outside [0, 1)."""
  for name in names:
    value = getattr(config, name)
    if not 0 <= value < 1:
      raise UserError(f'{prefix}{name}', value, 'at least 0 and below 1')


def divisors(n: int) -> str:
  """Returns the divisors of n in ascending order, for an error."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return ', '.join(map(str, [*small, *(n // d for d in reversed(small) if d * d < n)]))
