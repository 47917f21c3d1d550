"""Results of an evaluation: one record per checkpoint, for files, tables and plots."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.evaluation.score import Scores

Record = dict[str, Any]
"""`step`; for documents, the fields of Score over all sets together, and `sets` and `tags` with those of each set and tag; for tasks,
`tasks` with the metrics, METRIC_stderr, examples, fewshot and version of each task."""


def record(step: int, scores: Scores | None, tasks: Mapping[str, Mapping[str, Any]] | None) -> Record:
  """The record of a checkpoint, with `None` results left out."""
  found: Record = {**dataclasses.asdict(scores.overall), 'step': step, **dataclasses.asdict(scores)} if scores else {'step': step}
  return found | ({'tasks': {name: dict(metrics) for name, metrics in tasks.items()}} if tasks is not None else {})


def documents(found: Record) -> dict[str, Mapping[str, float]]:
  """The document scores of a record by metric name: NAME, tag/TAG, and, if there are several sets, `valid` for all sets together."""
  named = {**found.get('sets', {}), **{f'tag/{tag}': score for tag, score in found.get('tags', {}).items()}}
  return named | ({'valid': found} if len(found.get('sets', {})) > 1 else {})


def metrics(found: Record) -> dict[tuple[str, str], tuple[float, float | None]]:
  """(value, standard error or None) of each (task, metric) of a record."""
  return {(task, name): (value, values.get(f'{name}_stderr')) for task, values in found.get('tasks', {}).items()
          for name, value in values.items() if not name.endswith('_stderr') and name not in ('examples', 'fewshot', 'version')}


def table(records: Sequence[Record]) -> str:
  """A table for the terminal: a line per step and set (unless there is only one), then a line per step and metric of each task."""
  lines = []
  rows = [(found['step'], name, score) for found in records for name, score in documents(found).items()]
  if len(rows) > 1:
    lines.append(f'{"step":>9}  {"set":<22}{"loss":>10}{"perplexity":>14}{"bits/byte":>12}{"tokens":>14}')
    for step, name, score in rows:
      lines.append(f'{step:>9}  {name:<22}{score["loss"]:>10.4f}{score["perplexity"]:>14.3f}{score["bits_per_byte"]:>12.4f}'
                   f'{score["tokens"]:>14,}')
  values = [(found['step'], key, value, found['tasks'][key[0]]['examples']) for found in records for key, value in metrics(found).items()]
  if values:
    lines.append(f'{"step":>9}  {"task":<22}{"metric":<14}{"value":>14}{"std. error":>14}{"examples":>10}')
    for step, (task, name), (value, error), examples in values:
      lines.append(f'{step:>9}  {task:<22}{name:<14}{_short(value):>14}{"" if error is None else _short(error):>14}{examples or "":>10}')
  return '\n'.join(lines)


def _short(value: float) -> str:
  return f'{value:.4f}' if abs(value) < 1e3 else f'{value:,.1f}' if abs(value) < 1e7 else f'{value:.4g}'
