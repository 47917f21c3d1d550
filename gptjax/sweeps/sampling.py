"""Points that depend on results: each is a function of the sweep, its number, and the results that were known when it was drawn."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptjax.config import UserError
from gptjax.sweeps.points import Choice, Point, Uniform, unique_draws
from gptjax.sweeps.trials import Adaptive

_ATTEMPTS = 20
"""Points that the estimator is asked for until one is new and valid; then a random one is."""


def adaptive_point(adaptive: Adaptive, before: Sequence[Point], results: Mapping[int, float | None],
                   is_valid: Callable[[Point], bool] = lambda point: True) -> Point | None:
  """The point after those `before`; None if the space has no other that is valid.

  Args:
    results: by the number of a point, the value of a trial that is over, of which less is better; None: it failed. Others are running.
  """
  optuna = _optuna()
  spaces = {name: _distribution(optuna, field) for name, field in adaptive.space.items()}
  seen = {repr(point) for point in before}
  if wrong := next((point for point in before if point.keys() != adaptive.space.keys() or not all(
      _has(field, point[name]) for name, field in adaptive.space.items())), None):
    raise UserError('points: space', wrong, 'a point of the space, in which all points of a sweep lie; or another --out for another sweep')
  for attempt in range(_ATTEMPTS):
    seed = random.Random(f'{adaptive.seed} {len(before)} {attempt}').randrange(2**32)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(
      seed=seed, n_startup_trials=adaptive.startup, constant_liar=True))  # several trials run at a time
    study.add_trials([_trial(optuna, adaptive, spaces, point, number, results) for number, point in enumerate(before)])
    found = study.ask(spaces).params
    point = {name: _decoded(field, found[name]) for name, field in adaptive.space.items()}
    if repr(point) not in seen and is_valid(point):
      return point
  return next(iter(unique_draws(1, adaptive.space, random.Random(f'{adaptive.seed} {len(before)}'), before, is_valid)), None)


def _optuna() -> Any:
  try:
    import optuna
  except ImportError:
    raise UserError('points', 'Adaptive', 'Optuna: pip install -r requirements-sweep.txt') from None
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  return optuna


def _distribution(optuna: Any, field: Uniform | Choice) -> Any:
  if isinstance(field, Uniform):
    kind = optuna.distributions.IntDistribution if field.integer else optuna.distributions.FloatDistribution
    return kind(field.low, field.high, log=field.log)
  if _is_ordered(field):
    return optuna.distributions.IntDistribution(0, len(field.options) - 1)
  return optuna.distributions.CategoricalDistribution(range(len(field.options)))


def _has(field: Uniform | Choice, value: Any) -> bool:
  return value in field.options if isinstance(field, Choice) else field.low <= value <= field.high


def _is_ordered(field: Choice) -> bool:
  numbers = [one for one in field.options if isinstance(one, (int, float)) and not isinstance(one, bool)]
  return len(numbers) == len(field.options) and sorted(numbers) == numbers


def _decoded(field: Uniform | Choice, value: Any) -> Any:
  if isinstance(field, Choice):
    return field.options[value]
  return value if field.integer else min(max(float(f'{value:.4g}'), field.low), field.high)


def _trial(optuna: Any, adaptive: Adaptive, spaces: dict[str, Any], point: Point, number: int, results: Mapping[int, float | None]) -> Any:
  states = optuna.trial.TrialState
  value = results.get(number)
  state = states.RUNNING if number not in results else states.FAIL if value is None else states.COMPLETE
  params = {name: field.options.index(point[name]) if isinstance(field, Choice) else point[name] for name, field in adaptive.space.items()}
  value = None if value is None else min(value, 1e30)  # infinite ones are no numbers for the estimator
  return optuna.trial.create_trial(state=state, value=value, params=params, distributions=spaces)
