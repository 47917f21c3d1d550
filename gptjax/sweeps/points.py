"""The points of a sweep: lists of {field: value}, made from axes and combined as sets are.

A point gives some fields of a config values; every function here takes and returns lists of points without duplicates, in order.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gptjax.config import UserError

Point = dict[str, Any]
Points = list[Point]


def values(field: str, *options: Any) -> Points:
  """An axis: a point for each value of a field, such as values('optimizer.peak_lr', 1e-3, 3e-3)."""
  return unique({field: option} for option in options)


def seeds(count: int) -> Points:
  """The axis of the seeds 0 to count - 1."""
  return values('seed', *range(count))


def product(*parts: Points) -> Points:
  """Every combination of one point of each part; the last part varies fastest. Raises a UserError if two parts give the same field."""
  return unique(_joined(points) for points in itertools.product(*parts))


def chain(*parts: Points) -> Points:
  """The union: the points of all parts one after another."""
  return unique(itertools.chain(*parts))


def zipped(*parts: Points) -> Points:
  """The first points of all parts as one point, then the second ones, and so on. Raises a UserError for parts of unequal lengths."""
  if len({len(points) for points in parts}) > 1:
    raise UserError('zipped', [len(points) for points in parts], 'parts of one length')
  return unique(map(_joined, zip(*parts)))


def defaults(points: Points, **fields: Any) -> Points:
  """The points with values for the fields that they do not give; `fields`: with __ for the dot, as in optimizer__warmup=20."""
  return unique({**{name.replace('__', '.'): value for name, value in fields.items()}, **point} for point in points)


def sample(points: Points, count: int, seed: int = 0) -> Points:
  """`count` of the points, drawn without replacement, in their order; all if there are no more."""
  chosen = random.Random(seed).sample(range(len(points)), min(count, len(points)))
  return [points[index] for index in sorted(chosen)]


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Numbers from low to high, both included; with `integer` whole ones."""

  low: float
  high: float
  integer: bool = False
  log: bool = False
  """whether their logarithms are uniform"""

  def __post_init__(self):
    if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high) or (self.log and self.low <= 0):
      raise UserError(type(self).__name__, [self.low, self.high], 'two numbers in order' + ', above 0' * self.log)
    if self.integer and (self.low % 1 or self.high % 1):
      raise UserError(type(self).__name__, [self.low, self.high], 'whole numbers with integer=True')

  def draw(self, generator: random.Random) -> float:
    """One number."""
    low, high = (self.low - 0.5, self.high + 0.5) if self.integer else (self.low, self.high)
    ends = (math.log(max(low, 0.5 if self.integer else low)), math.log(high)) if self.log else (low, high)
    found = generator.uniform(*ends)
    found = min(max(math.exp(found) if self.log else found, self.low), self.high)
    return round(found) if self.integer else float(f'{found:.4g}')  # names and tables show as many digits


def LogUniform(low: float, high: float, integer: bool = False) -> Uniform:
  """Numbers whose logarithms are uniform between those of low and high."""
  return Uniform(low, high, integer, log=True)


@dataclasses.dataclass(frozen=True)
class Choice:
  """One of some values; numbers in order are near each other for a sampler that adapts."""

  options: tuple[Any, ...]

  def __init__(self, *options: Any):
    object.__setattr__(self, 'options', tuple(map(_listed, options)))
    if not options:
      raise UserError('Choice', [], 'one or more values')

  def draw(self, generator: random.Random) -> Any:
    """One of them."""
    return generator.choice(self.options)


def _listed(value: Any) -> Any:
  return [_listed(one) for one in value] if isinstance(value, (list, tuple)) else value  # as it comes back from a file


Space = Mapping[str, Uniform | Choice]
"""A distribution of values for each field."""


def draws(count: int, space: Space, seed: int = 0) -> Points:
  """Random search: `count` different points of a space, or all if it has no more. Point n depends on the seed and the points before it."""
  return unique_draws(count, space, random.Random(seed), [])


def unique_draws(count: int, space: Space, generator: random.Random, before: Sequence[Point],
                 is_valid: Callable[[Point], bool] = lambda point: True) -> Points:
  """Random points that are neither among those `before` nor equal, and valid."""
  seen, found = {_key(point) for point in before}, []
  for _ in range(count):
    point = next((one for one in ({name: field.draw(generator) for name, field in space.items()} for _ in range(1000))
                  if _key(one) not in seen and is_valid(one)), None)
    if point is None:
      break
    seen.add(_key(point))
    found.append(point)
  return found


def unique(points: Iterable[Point]) -> Points:
  """The points without those that were there before."""
  found: dict[str, Point] = {}
  for point in points:
    found.setdefault(_key(point), point)
  return list(found.values())


def _key(point: Point) -> str:
  return repr(sorted(point.items(), key=lambda item: item[0]))


def _joined(points: Iterable[Point]) -> Point:
  joined: Point = {}
  for point in points:
    for name, value in point.items():
      if name in joined:
        raise UserError(name, [joined[name], value], 'a field in one of the parts that are combined')
      joined[name] = value
  return joined
