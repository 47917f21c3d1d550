"""The values that a field of a config may have, as a part of its type; a Group checks them when it is created."""

import math
import typing
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from gptjax.config.errors import UserError

INT32_MAX = 2**31 - 1
"""Devices count steps, ids and positions in int32."""


class Limit(NamedTuple):
  """A condition on a field's value, in its type: Annotated[int, Limit(...)]."""

  holds: Callable[[Any], bool]
  expected: str


def at_least(lowest: float) -> Limit:
  """The limit of values from `lowest` on."""
  return Limit(lambda value: value >= lowest, f'{lowest} or more')


def at_most(highest: float) -> Limit:
  """The limit of values up to `highest`."""
  return Limit(lambda value: value <= highest, f'{highest} or less')


Positive = Annotated[int, at_least(1), at_most(INT32_MAX)]
NonNegative = Annotated[int, at_least(0), at_most(INT32_MAX)]
PositiveFloat = Annotated[float, Limit(lambda value: value > 0, 'a number above 0')]
NonNegativeFloat = Annotated[float, at_least(0)]
Fraction = Annotated[float, Limit(lambda value: 0 <= value <= 1, '0 to 1')]
FractionBelow1 = Annotated[float, Limit(lambda value: 0 <= value < 1, 'at least 0 and below 1')]


class Group:
  """A group of fields of a config; a value outside the limits of its field's type raises a UserError that names it with a prefix."""

  _prefix, _limits = '', list[tuple[str, Limit]]()  # without annotations, which would make them fields

  def __init_subclass__(cls, prefix: str = '') -> None:
    hints = typing.get_type_hints(cls, include_extras=True)
    cls._prefix, cls._limits = prefix, [(name, limit) for name, hint in hints.items() for limit in getattr(hint, '__metadata__', ())]

  def __post_init__(self) -> None:
    for name, limit in self._limits:
      if not limit.holds(value := getattr(self, name)):
        raise UserError(f'{self._prefix}{name}', value, limit.expected)


def divisors(n: int) -> str:
  """Returns the divisors of n in ascending order, for an error."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return ', '.join(map(str, [*small, *(n // d for d in reversed(small) if d * d < n)]))
