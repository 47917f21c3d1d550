"""What the files of a run's workdir say, checked, for tools that show runs."""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from gptjax.config import INT32_MAX, Config, UserError, from_json

Row = Mapping[str, Any]


class Kind(NamedTuple):
  """What is scored, and the figures that the page shows."""

  measure: tuple[str, str]
  """the field by which a model is compared, and its name"""
  fields: tuple[str, ...]
  names: tuple[str, ...]
  loss: str = 'nats per token'
  """unit"""


KINDS = {
  'documents': Kind(('bits_per_byte', 'bits per byte'), ('loss', 'perplexity', 'bits_per_byte', 'tokens'),
                     ('nats per token', 'perplexity', 'bits per byte', 'tokens scored')),
  'texts': Kind(('accuracy', 'accuracy'), ('loss', 'accuracy', 'macro_f1', 'texts'),
                 ('nats per text', 'accuracy', 'macro F1', 'texts scored'), 'nats per text'),
  'margin': Kind(('accuracy', 'pair accuracy'), ('loss', 'accuracy', 'margin', 'examples'),
                  ('nats per pair', 'pair accuracy', 'margin', 'pairs scored'), 'nats per pair'),
  'reward': Kind(('reward', 'reward'), ('reward', 'pass@1', 'greedy', 'examples'), ('reward', 'pass@1', 'greedy', 'prompts scored'),
                  'of the policy')}
"""By a field that only results of this kind have; of documents none."""

@dataclasses.dataclass(frozen=True)
class Run:
  """What the files of a workdir say."""

  name: str
  folder: pathlib.Path
  config: Config
  rows: list[dict[str, Any]]
  """of metrics.jsonl"""
  facts: dict[str, Any]
  """of run.json"""
  evaluation: dict[str, Any]
  samples: list[dict[str, Any]]

  @property
  def kind(self) -> Kind:
    return kind_of(self.evaluation, self.config.objective.kind)

  @property
  def baselines(self) -> dict[str, float]:
    """Scores of other methods on the same documents."""
    found = {name: value for name, value in self.evaluation.get('baselines', {}).items() if not math.isnan(value)}
    for name, groups in self.evaluation.get('class_baselines', {}).items():  # all sets together, or the only one
      found[name] = [*groups.values()][-1]['accuracy']
    return found

  @property
  def clock(self) -> dict[str, list[float]]:
    """Tokens and hours by step. Hours are those of the steps alone, from their speed."""
    steps, tokens = series(self.rows, 'tokens')
    speeds = dict(zip(*map(np.ndarray.tolist, series(self.rows, 'tokens_per_second'))))
    hours, before = [], 0.0
    for step, count in zip(steps.tolist(), tokens.tolist()):
      speed = speeds.get(step, math.nan)
      hours.append((hours[-1] if hours else 0.0) + ((count - before) / speed / 3600 if speed > 0 else 0.0))
      before = count
    return {'step': [0.0, *steps.tolist()], 'tokens': [0.0, *tokens.tolist()], 'hours': [0.0, *hours]}


def read(workdir: pathlib.Path, name: str) -> Run:
  """Reads a workdir, with a name for it. Raises a UserError for a file that is damaged, or missing; then the error names the command that
  writes it."""
  path = workdir / 'config.json'
  config, rows = from_json(_read(path), str(path)), _objects(workdir / 'metrics.jsonl', 'step')
  for n, row in enumerate(rows, 1):
    _check_numbers(row, row, f'{workdir / "metrics.jsonl"}:{n}')
  [facts], evaluation = _objects(workdir / 'run.json'), _evaluation(workdir / 'evaluation.json')
  samples = _objects(workdir / 'samples.jsonl', 'step') if (workdir / 'samples.jsonl').is_file() else []
  return Run(name, workdir, config, rows, facts, evaluation, samples)


def _read(path: pathlib.Path) -> str:
  if not path.is_file():
    command = f'python -m gptjax.train --config=configs/NAME.py --workdir={path.parent}'
    raise UserError(str(path), 'no such file', f'the output of `{command}`')
  return path.read_text(encoding='utf-8', errors='replace')


def _objects(path: pathlib.Path, *numbers: str) -> list[dict[str, Any]]:
  """Returns the object of a .json file, or those in the complete lines of a .jsonl file, each checked for the named numbers."""
  text, found = _read(path), []
  for n, line in enumerate(text.split('\n')[:-1] if path.suffix == '.jsonl' else [text], 1):
    try:
      found.append(json.loads(line))
    except (ValueError, RecursionError) as error:
      raise UserError(f'{path}:{n}', line[:80], f'a JSON object ({error})') from error
    _check_numbers(found[-1], numbers, f'{path}:{n}')
  return found


def _check_numbers(found: Any, names: Iterable[str], place: str) -> None:
  """Checks that an object has the named numbers; null becomes NaN, which JSON lacks."""
  if not isinstance(found, dict):
    raise UserError(place, found, 'a JSON object')
  for name in names:
    value = found.get(name, '')
    if value is None and name != 'step':
      found[name] = math.nan
    elif name == 'step' and not (isinstance(value, int) and 0 <= value <= INT32_MAX):
      raise UserError(f'{place}: {name}', value, 'a count of steps')
    elif not isinstance(value, (int, float)) or sys.float_info.max < abs(value) < math.inf:  # an int may exceed every float
      raise UserError(f'{place}: {name}', value, 'a number')


def _evaluation(path: pathlib.Path) -> dict[str, Any]:
  """Returns the results of gptjax.evaluate, with the displayed fields validated; none if it did not score documents."""
  [found] = _objects(path) if path.is_file() else [{}]
  if not {*found} - {'step', 'tasks'}:
    return {}
  fields = kind_of(found).fields
  _check_numbers(found, (*fields, 'step'), f'{path}:1')
  found['baselines'] = found.get('baselines') or {}
  _check_numbers(found['baselines'], found['baselines'], f'{path}: baselines')
  for group in ('sets', 'tags'):
    _check_numbers(found.setdefault(group, {}), (), f'{path}: {group}')
    for name, score in found[group].items():
      _check_numbers(score, fields, f'{path}: {group}: {name}')
  return found


def kind_of(evaluation: Row, objective: str = '') -> Kind:
  """The kind of results, or if there are none that of an objective."""
  expected = {'classification': 'texts', 'preference': 'margin', 'grpo': 'reward'}.get(objective, 'documents')
  return KINDS[next((name for name in KINDS if name in evaluation), 'documents' if evaluation else expected)]


def series(rows: Iterable[Row], name: str) -> tuple[Float[np.ndarray, ' N'], Float[np.ndarray, ' N']]:
  """Returns a metric's steps, ascending, and values (null: NaN); of steps that were repeated after a resume, the later ones."""
  points: list[tuple[float, float]] = []
  for row in rows:
    if name in row:
      while points and points[-1][0] >= row['step']:
        points.pop()
      points.append((row['step'], row[name]))
  steps, values = np.array(points, float).reshape(-1, 2).T
  return steps, values
