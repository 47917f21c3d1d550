"""A sweep and its trials: what `get_sweep()` returns, and the checked config of every point."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gptjax import config as configs
from gptjax.config import Config, UserError, flatten
from gptjax.config.fields import FIELDS, checked
from gptjax.sweeps.points import Choice, Point, Points, Space, Uniform

_USUAL = flatten(Config())


@dataclasses.dataclass(frozen=True)
class Halving:
  """Early stopping by asynchronous successive halving (ASHA, arXiv:1810.05934): every trial runs to the first rung; of those that have
  reached a rung, the best 1 / `reduction` go on."""

  rungs: Sequence[int]
  """steps, ascending, before the last step of the recipe"""
  reduction: int = 4


@dataclasses.dataclass(frozen=True)
class Adaptive:
  """Points that depend on the results so far: a tree-structured Parzen estimator (TPE), by Optuna."""

  count: int
  space: Space
  seed: int = 0
  startup: int = 10
  """points that are drawn at random first"""


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Variations of a recipe."""

  recipe: str
  """a Python file with get_config(), or a run's config.json"""
  points: Points | Adaptive
  metric: str = 'eval/valid/loss'
  """name in metrics.jsonl of what the sweep minimizes: its last value"""
  maximize: bool = False
  """whether it is maximized"""
  overrides: Point = dataclasses.field(default_factory=dict)
  """values of fields for all trials"""
  halving: Halving | None = None


@dataclasses.dataclass(frozen=True)
class Trial:
  """One point, and the config that it makes of the recipe."""

  name: str
  """of its workdir: its overrides, and a hash of all values that are not the defaults, so that a new field changes no name"""
  point: Point
  config: Config


def load_sweep(path: Path) -> Sweep:
  """The sweep of a Python file with `get_sweep() -> Sweep`; a UserError, with the line, if that fails."""
  if not path.is_file():
    raise UserError('--sweep', str(path), 'a sweep, a Python file with get_sweep() -> gptjax.sweeps.Sweep')
  sweep = configs.returned(str(path), path, 'get_sweep', Sweep, 'a sweep, a Python file with get_sweep() -> Sweep')
  _check(sweep, path)
  return sweep


def _check(sweep: Sweep, path: Path) -> None:
  points, halving = sweep.points, sweep.halving
  if isinstance(points, Adaptive):
    if not (isinstance(points.count, int) and points.count > 0 and isinstance(points.space, dict) and points.space
            and all(isinstance(field, (Uniform, Choice)) for field in points.space.values())):
      raise UserError(f'{path}: points', f'Adaptive of {points.count!r} points', 'a number of points above 0, and a space of Uniform, '
                      'LogUniform and Choice by field')
    _check_space(points.space, path)
    if halving:
      raise UserError(f'{path}: halving', 'with Adaptive points', 'one of both: points that adapt learn from complete trials')
  elif not (isinstance(points, list) and points and all(isinstance(point, dict) and all(
      isinstance(name, str) for name in point) for point in points)):
    raise UserError(f'{path}: points', str(points)[:60], 'a list of one or more points, as from values() and product(), or Adaptive')
  for name, kind, words in (('recipe', str, 'the path of a recipe'), ('metric', str, 'a name in metrics.jsonl'),
                            ('maximize', bool, 'true or false'), ('overrides', dict, '{field: value}')):
    if not isinstance(value := getattr(sweep, name), kind):
      raise UserError(f'{path}: {name}', str(value), words)
  if halving and not (isinstance(halving, Halving) and isinstance(halving.rungs, (list, tuple)) and isinstance(halving.reduction, int)
                      and all(isinstance(rung, int) for rung in halving.rungs)):
    raise UserError(f'{path}: halving', str(halving), 'Halving of a list of steps, as Halving((100, 300), reduction=3)')
  if halving and (not halving.rungs or list(halving.rungs) != sorted(set(halving.rungs)) or halving.rungs[0] < 1 or halving.reduction < 2):
    raise UserError(f'{path}: halving', f'rungs {list(halving.rungs)}, reduction {halving.reduction}',
                    'one or more steps in ascending order, and a reduction of at least 2')
  if halving and isinstance(points, list) and len(points) < (least := halving.reduction**len(halving.rungs)):
    raise UserError(f'{path}: halving', f'{len(points)} points', f'{least} or more, of which one reaches the end')


def _check_space(space: Space, path: Path) -> None:
  """Raises a UserError for a field that does not exist, or a value that it never takes; combinations are checked as they are drawn."""
  for name, field in space.items():
    if name not in FIELDS:
      configs.override(Config(), {name: None}, f'{path}: points: ')  # says which field may be meant
    for value in field.options if isinstance(field, Choice) else map(int if field.integer else float, (field.low, field.high)):
      checked(FIELDS[name], value, f'{path}: points: {name}')


def make_trials(sweep: Sweep, points: Iterable[Point], path: Path) -> list[Trial]:
  """The trial of each point. Raises a UserError for the first wrong one, which says how many are: nothing has started then."""
  base, trials, wrong = configs.load(sweep.recipe), [], []
  points = list(points)
  for point in points:
    try:
      trials.append(_trial(base, sweep.overrides | point, point))
      _check_rungs(sweep, trials[-1].config)
      _check_metric(sweep, trials[-1].config)
    except UserError as error:
      wrong.append(str(error))
  if wrong:
    more = f'; {len(wrong)} of {len(points)} trials are wrong' if len(points) > 1 else ''
    raise UserError.from_text(f'{path}: {wrong[0]}{more}')
  return list({trial.config: trial for trial in reversed(trials)}.values())[::-1]  # points may differ and mean the same


def _trial(base: Config, values: Point, point: Point) -> Trial:
  config = configs.resolved(base, values)
  changed = {name: value for name, value in flatten(config).items() if value != _USUAL[name]}
  digest = hashlib.sha256(json.dumps(changed, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()[:10]
  short = {name: name.rpartition('.')[2] for name in point}
  words = [f'{name if list(short.values()).count(last) > 1 else last}={value}' for (name, last), value in
           zip(short.items(), point.values())]
  return Trial(f'{re.sub(r"[^A-Za-z0-9._=+,-]+", "-", ",".join(words))[:100]}{"-" * bool(words)}{digest}', point, config)


def _check_metric(sweep: Sweep, config: Config) -> None:
  """Raises a UserError for a metric of a validation set that the trial does not have."""
  sets = {'valid', *(name for valid in config.data.valid for name in (valid.name, *valid.tags))}
  if sweep.metric.startswith('eval/') and (given := sweep.metric.split('/')[1]) not in sets:
    raise UserError('metric', sweep.metric, f'eval/NAME/FIGURE, with one of the validation sets and tags: {", ".join(sorted(sets))}',
                    sets, given)


def _check_rungs(sweep: Sweep, config: Config) -> None:
  if not sweep.halving:
    return
  rungs, every = list(sweep.halving.rungs), config.eval.every
  if isinstance(config.steps, int) and rungs[-1] >= config.steps:
    raise UserError('halving: rungs', rungs, f'steps below the last, {config.steps}')
  if sweep.metric.startswith('eval/') and isinstance(every, int) and (not every or any(rung % every for rung in rungs)):
    raise UserError('halving: rungs', rungs, f'multiples of eval.every={every}, which is when {sweep.metric} is measured')
