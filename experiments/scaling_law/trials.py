"""The runs of a sweep: a CSV with a line per run, whose columns are the fields that it overrides in a recipe, and what it measured."""

import csv
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.scaling_law.fit import Runs
from gptjax.config import Config, UserError, duration_in_steps, override
from gptjax.config.fields import FIELDS, parse
from gptjax.model import active_parameters, flops_per_token

_COUNTED = ('model.', 'data.context', 'batch_size', 'steps')
"""Beginnings of the fields from which N, D and C follow."""


@dataclasses.dataclass(frozen=True)
class Trials:
  """Runs that have ended."""

  parameters: Runs
  """N"""
  tokens: Runs
  """D"""
  compute: Runs
  """C, FLOPs"""
  loss: Runs
  """nats per token"""
  left_out: int
  """runs without a loss, or that ended before their last step, or that are shorter than asked for"""
  fields: list[str]
  """columns from which N, D and C follow"""


def read(path: Path, recipe: Config, measured: str = 'eval/valid/loss', least_steps: int = 1) -> Trials:
  """Reads the runs of a sweep over a recipe; `measured` is the column with the loss, and shorter runs than `least_steps` are left out.
  What the sweep overrides for all runs is not in the CSV, and must be in the recipe.

  Raises a UserError for a missing column, a value that is not valid, or a loss that is not finite.
  """
  try:
    with path.open(newline='', encoding='utf-8-sig') as file:
      lines = csv.DictReader(file, strict=True)
      columns = lines.fieldnames or []
      rows = [(f'{path}:{lines.line_num}', row) for row in lines]
  except (csv.Error, UnicodeDecodeError) as error:
    raise UserError(str(path), str(error), 'a CSV file in UTF-8') from None
  if measured not in columns:
    raise UserError(str(path), ','.join(columns), f'a table with a column {measured}', columns, measured)
  found, left_out = [], 0
  for place, row in rows:
    if None in row or None in row.values():
      raise UserError(place, ','.join(one for one in row.values() if isinstance(one, str)), f'{len(columns)} columns')
    config = override(recipe, {name: parse(FIELDS[name], text) for name, text in row.items() if name in FIELDS and text}, f'{place}: ')
    parameters, tokens, compute = counted(config, place)
    steps = _steps(config, place)
    if steps < least_steps or not row[measured] or (step := _number(place, row, 'step', str(steps))) < steps:
      left_out += 1
    elif step > steps:
      raise UserError(f'{place}: step', int(step), f'at most steps={steps}; what the sweep overrides for all runs must be in the recipe')
    else:
      found.append((parameters, tokens, compute, _number(place, row, measured)))
  n, d, c, loss = np.array(found, float).reshape(-1, 4).T
  return Trials(n, d, c, loss, left_out, [name for name in columns if name in FIELDS and name.startswith(_COUNTED)])


def counted(config: Config, place: str) -> tuple[float, float, float]:
  """N, D and C of a run: its parameters, of experts those that a token uses; all tokens of its rows; the FLOPs of matrix products.

  `place` is named in errors.
  """
  if not config.model.vocab_size:
    raise UserError(f'{place}: model.vocab_size', 0, 'the number of token ids, in the recipe or the sweep: no tokenizer is read')
  tokens = _steps(config, place) * config.batch_size * config.data.context
  return (float(active_parameters(config.model, config.data.context)), float(tokens),
          float(tokens * flops_per_token(config.model, config.data.context)))


def _steps(config: Config, place: str) -> int:
  if 'epoch' in str(config.steps).lower():
    raise UserError(f'{place}: steps', config.steps, "steps or tokens, such as '1.5e6 tokens': the length of an epoch is unknown here")
  return duration_in_steps(f'{place}: steps', config.steps, batch_size=config.batch_size, context=config.data.context, rows_per_epoch=1)


def _number(place: str, row: Mapping[str, str], name: str, default: str = '') -> float:
  text = row.get(name) or default
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise UserError(f'{place}: {name}', text, 'a finite number above 0')
  return value
