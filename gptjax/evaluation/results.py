"""What an evaluation found, as a record a checkpoint: for files, tables and pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.evaluation.score import Scores

Record = dict[str, Any]
"""step; of documents: the fields of Score over all sets as one, `sets` and `tags` with those of each; of tasks: `tasks`, each with its
metrics, METRIC_stderr, examples, fewshot and version."""

_COLUMNS = ('loss', 'perplexity', 'bits_per_byte', 'tokens')


def record(step: int, scores: Scores | None, tasks: Mapping[str, Mapping[str, Any]] | None) -> Record:
  """The record of a checkpoint's scores; what was not scored is not in it."""
  found: Record = {}
  if scores:
    found |= dataclasses.asdict(scores.overall)
  found['step'] = step
  if scores:
    for group in ('sets', 'tags'):
      found[group] = {name: dataclasses.asdict(score) for name, score in getattr(scores, group).items()}
  return found | ({'tasks': {name: dict(metrics) for name, metrics in tasks.items()}} if tasks is not None else {})


def documents(found: Record) -> dict[str, Mapping[str, float]]:
  """The scores of a record by the names that metrics have: NAME, tag/TAG, and valid for all sets as one, where there are several."""
  named = {**found.get('sets', {}), **{f'tag/{tag}': score for tag, score in found.get('tags', {}).items()}}
  return named | ({'valid': found} if len(found.get('sets', {})) > 1 else {})


def metrics(found: Record) -> dict[tuple[str, str], tuple[float, float | None]]:
  """(value, standard error or None) of each (task, metric) of a record."""
  return {(task, name): (value, values.get(f'{name}_stderr')) for task, values in found.get('tasks', {}).items()
          for name, value in values.items() if not name.endswith('_stderr') and name not in ('examples', 'fewshot', 'version')}


def table(records: Sequence[Record]) -> str:
  """Lines for the screen: a line a step and set, then a line a step and metric of a task; none for a single set of a single step."""
  lines = []
  rows = [(found['step'], name, score) for found in records for name, score in documents(found).items()]
  if len(rows) > 1:
    lines.append(f'{"step":>9}  {"set":<22}{"loss":>10}{"perplexity":>14}{"bits/byte":>12}{"tokens":>14}')
    for step, name, score in rows:
      loss, perplexity, bits, tokens = (score[column] for column in _COLUMNS)
      lines.append(f'{step:>9}  {name:<22}{loss:>10.4f}{perplexity:>14.3f}{bits:>12.4f}{tokens:>14,}')
  told = [(found['step'], key, value, found['tasks'][key[0]]['examples']) for found in records for key, value in metrics(found).items()]
  if told:
    lines.append(f'{"step":>9}  {"task":<22}{"metric":<14}{"value":>14}{"std. error":>14}{"examples":>10}')
    for step, (task, name), (value, error), examples in told:
      lines.append(f'{step:>9}  {task:<22}{name:<14}{_short(value):>14}{"" if error is None else _short(error):>14}{examples or "":>10}')
  return '\n'.join(lines)


def _short(value: float) -> str:
  return f'{value:.4f}' if abs(value) < 1000 else f'{value:,.1f}'
