"""Writes a report of one or more training runs as one HTML file that needs no network: python -m tools.report --workdir=DIR

With --workdir given several times, the runs are drawn over each other.

The page follows from the files in the workdirs alone: equal runs give equal pages. Its charts are drawn by a script in the page
(report.js), which smooths, changes axes and shows the values under the pointer.
"""

import dataclasses
import html
import json
import math
import os
import pathlib
import re
import string
import tempfile
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from gptjax.config import Config, UserError, describe, differences, run
from gptjax.files import expanded, writable
from .run_files import KINDS, Row, Run, kind_of, read, series

COLORS = 8
"""of lines, by number in report.css"""
MOST_POINTS = 1000
"""of a line: the lowest and highest points of narrow columns suffice to draw it"""
SAMPLES = 5
"""that are shown at once; earlier ones are folded"""


# Charts

def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """The charts for report.js: a title, a note, a unit, whether the axis begins at 0, and lines of all runs."""
  kind = runs[0].kind
  found = [_chart(runs, 'Loss', '', kind.loss, late=True, metrics={'loss': 'training'},
                  scores='loss' if kind is not KINDS['reward'] else '')]  # whose validation loss is another figure
  found.append(_chart(runs, 'Validation', 'while training', kind.measure[1], scores=kind.measure[0],
                      metrics={'reward': 'training'} if kind is KINDS['reward'] else {}))
  if len(runs) == 1:
    found[-1]['baselines'] = [{'label': name, 'value': value} for name, value in runs[0].baselines.items() if math.isfinite(value)]
  rates = {name: name.removesuffix('learning_rate').strip('_') or 'all' for one in runs for row in one.rows for name in row
           if name.endswith('learning_rate')}
  if len(rates) > 1:
    rates['learning_rate'] = 'other'
  schedules = {one.config.optimizer.schedule for one in runs}
  clips = {f'before clipping to {one.config.optimizer.clip:g}' if one.config.optimizer.clip else 'never clipped' for one in runs}
  found.append(_chart(runs, 'Learning rate', ', '.join(sorted(schedules)), 'rate', zero=True, metrics=rates, smoothed=False))
  found.append(_chart(runs, 'Gradient norm', ', '.join(sorted(clips)), 'global L2 norm', metrics={'grad_norm': ''}))
  found.append(_chart(runs, 'Speed', 'all devices', 'tokens per second', zero=True, metrics={'tokens_per_second': ''}))
  for title, note, unit, name in (
      ('Divergence', 'from the teacher', 'nats per token', 'kl'), ('Model FLOPs utilization', '', 'fraction of the peak', 'mfu'),
      ('Waiting for data', '', 'fraction of the time', 'data_wait')):
    if any(name in row for one in runs for row in one.rows):
      found.append(_chart(runs, title, note, unit, zero=True, metrics={name: ''}))
  return found


def _chart(runs: Sequence[Run], title: str, note: str, unit: str, *, metrics: Mapping[str, str], scores: str = '', zero: bool = False,
           late: bool = False, smoothed: bool = True) -> dict[str, Any]:
  """A chart of metrics of the steps, by the name of their lines, and of a score of the validation sets.

  late: the axis fits what comes after the first steps, whose decrease would use most of the height.
  """
  lines: list[dict[str, Any]] = []

  def add(number: int, metric: str, words: str, **style: Any) -> None:
    steps, values = _thinned(*series(runs[number].rows, metric))
    if len(steps):
      several = len(runs) > 1
      label = ', '.join(filter(None, (runs[number].name if several else '', words))) or title
      lines.append({'run': number, 'label': label, 'key': runs[number].name if several else label, 'steps': steps.tolist(),
                    'color': (number if several else len(lines)) % COLORS, 'named': bool(words) and not several,
                    'values': [float(f'{value:.6g}') if math.isfinite(value) else None for value in values.tolist()],
                    'smoothed': smoothed, 'points': False, 'dashed': False} | style)

  for number, one in enumerate(runs):
    for place, (metric, words) in enumerate(metrics.items()):
      add(number, metric, words, dashed=len(runs) > 1 and place > 0)
    if scores:
      sets = sorted({found[1] for row in one.rows for key in row if (found := re.fullmatch(f'eval/(?!tag/)(.+)/{scores}', key))})
      for name in sets:
        add(number, f'eval/{name}/{scores}', name, points=True, smoothed=False)
  return {'title': title, 'note': note, 'unit': unit, 'zero': zero, 'late': late, 'lines': lines, 'baselines': []}


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  if len(steps) <= MOST_POINTS:
    return steps, values
  keep: set[int] = {0, len(steps) - 1}
  for part in np.array_split(np.arange(len(steps)), MOST_POINTS // 3):
    finite = np.where(np.isfinite(values[part]), values[part], math.inf)
    keep |= {int(part[finite.argmin()]), int(part[np.where(np.isfinite(values[part]), values[part], -math.inf).argmax()])}
    keep |= {int(part[np.isfinite(values[part]).argmin()])} if not np.isfinite(values[part]).all() else set()
  chosen = sorted(keep)
  return steps[chosen], values[chosen]


# Words and tables

def _shown(value: object) -> str:
  """Formats a value: four digits of a float, thousands separators."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return value if isinstance(value, str) else json.dumps(value, default=dataclasses.asdict)
  return f'{value:,.0f}' if isinstance(value, int) or 1e4 <= abs(value) < 1e12 else f'{value:.4g}'


def _table(rows: Iterable[Sequence[object]], *head: str) -> str:
  lines = [('th', head)] * bool(head) + [('td', row) for row in rows]
  cells = (''.join(f'<{tag}>{html.escape(_shown(cell))}</{tag}>' for cell in line) for tag, line in lines)
  return f'<table>{"".join(f"<tr>{line}</tr>" for line in cells)}</table>'


def _against(ours: float, baseline: float) -> str:
  if not math.isfinite(ours) or not 0 < baseline < math.inf:
    return ''
  percent = round(100 * (ours / baseline - 1))
  return f'{abs(percent)} % {"above" if percent > 0 else "below"}' if percent else 'level with'


def verdict(evaluation: Row, baselines: Mapping[str, float], rows: Iterable[Row]) -> str:
  """Returns a one-sentence summary: the score, its comparison with the baselines, and any reason for doubt."""
  field, unit = kind_of(evaluation).measure
  score, step = evaluation.get(field, math.nan), evaluation.get('step', math.inf)
  text = f'Validation {score:.2f} {unit}' if math.isfinite(score) else 'The validation loss is not finite'
  compared = [f'{words} {name}' for name, value in baselines.items() if (words := _against(score, value))]
  text += f' at step {_shown(step)}' + f', {" and ".join(compared)}' * bool(compared)
  if not evaluation:
    text = 'Not evaluated; python -m gptjax.evaluate scores the held-out documents'
  steps, losses = series(rows, 'loss')
  bad = steps[~np.isfinite(losses)]
  if not steps.size:
    text += ', but metrics.jsonl holds no training step'
  elif bad.size:
    text += f', but {bad.size:,} of {steps.size:,} training losses are not finite, the first at step {bad[0]:,.0f}'
  elif step < steps[-1]:
    text += f', while training stands at step {steps[-1]:,.0f}'
  return text + '.'


def _scores(evaluation: Row, baselines: Mapping[str, float], rows: Sequence[Row]) -> str:
  """Returns the final scores, and a bar chart of bits per byte, or of accuracy, and its baselines."""
  (field, unit), shown, names, _ = kind_of(evaluation)
  score = evaluation.get(field, math.nan)
  found = {name: evaluation[metric] for name, metric in zip(names, shown) if evaluation}
  for name, metric, form in (('median tokens/s', 'tokens_per_second', '{:,.0f}'), ('median MFU', 'mfu', '{:.1%}')):
    values = series(rows, metric)[1]
    if np.isfinite(values).any():
      found[name] = form.format(np.nanmedian(values)).replace('%', ' %')
  tiles = ''.join(f'<div><dt>{name}</dt><dd>{_shown(value)}</dd></div>' for name, value in found.items())
  longest = max((value for value in (score, *baselines.values()) if math.isfinite(value)), default=1)
  bars = '<tr><th></th><th colspan="2">' + unit + '</th><th>the model is</th></tr>'
  for name, value in [('this model', score), *baselines.items()]:
    kind, words = ('', _against(score, value)) if name in baselines else ('model', '')
    bar = f'<i style="width: {100 * value / longest:.1f}%"></i>' if 0 < value <= longest else ''
    cells = ''.join(f'<td>{cell}</td>' for cell in (html.escape(name), f'{value:.3f}', bar, words))
    bars += f'<tr class="{kind}">{cells}</tr>'
  named = [(name, *(one[metric] for metric in shown))
           for group in ('sets', 'tags') for name, one in evaluation.get(group, {}).items()]
  sets = f'<div class="scroll">{_table(named, "set or tag", *names)}</div>' if named else ''
  return f'<dl>{tiles}</dl>' + f'<table class="bars">{bars}</table>' * bool(baselines) + sets


def _hours(run: Run) -> str:
  hours = run.clock['hours'][-1]
  return f'{hours:.1f} h' if hours >= 1 else f'{60 * hours:.1f} min'


def _compared(runs: Sequence[Run]) -> str:
  """A table with a row per run: final scores, size and speed."""
  field, unit = runs[0].kind.measure
  rows = []
  for one in runs:
    speed = series(one.rows, 'tokens_per_second')[1]
    steps = series(one.rows, 'loss')[0]
    rows.append((one.name, one.evaluation.get(field, math.nan), one.evaluation.get('loss', math.nan), steps[-1] if len(steps) else 0,
                 one.clock['tokens'][-1], one.facts.get('parameters', ''),
                 float(np.nanmedian(speed)) if np.isfinite(speed).any() else math.nan, _hours(one)))
  cells = [tuple('' if isinstance(cell, float) and math.isnan(cell) else cell for cell in row) for row in rows]
  head = 'run', unit, 'loss', 'step', 'tokens', 'parameters', 'median tokens/s', 'training'
  return f'<div class="scroll scores">{_table(cells, *head)}</div>'


def _best(runs: Sequence[Run]) -> str:
  """One sentence on several runs."""
  field, unit = runs[0].kind.measure
  scored = [one for one in runs if math.isfinite(one.evaluation.get(field, math.nan))]
  if not scored:
    return f'{len(runs)} runs, none of them evaluated; python -m gptjax.evaluate scores the held-out documents.'
  pick = min if unit == 'bits per byte' else max
  first = pick(scored, key=lambda one: one.evaluation[field])
  return f'{first.name} is the best of {len(runs)} runs: validation {first.evaluation[field]:.3f} {unit}.'


def _changed(runs: Sequence[Run]) -> str:
  """The fields of one run that are not the default, or those in which runs differ."""
  if len(runs) == 1:
    changed = differences(Config(), runs[0].config)
    return _table([(name, *values[::-1]) for name, values in changed.items()], 'field', 'this run', 'default')
  names = dict.fromkeys(name for one in runs[1:] for name in differences(runs[0].config, one.config))
  value = lambda one, name: (differences(runs[0].config, one.config).get(name) or (None, first[name]))[1]
  first = {name: next(values[0] for one in runs[1:] if (values := differences(runs[0].config, one.config).get(name))) for name in names}
  rows = [(name, first[name], *(value(one, name) for one in runs[1:])) for name in names]
  return f'<div class="scroll">{_table(rows, "field", *(one.name for one in runs))}</div>' if rows else 'The runs have equal configs.'


def _fields(run: Run) -> str:
  changed = differences(Config(), run.config)
  lines = [(line.partition(' = ')[0] in changed, html.escape(line)) for line in describe(run.config).split('\n')]
  marked = '\n'.join(f'<mark>{line}</mark>' if differs else line for differs, line in lines)
  return f'<details><summary>all fields of {html.escape(run.name)}</summary><pre>{marked}</pre></details>'


def _texts(run: Run) -> str:
  shown = [[html.escape(_shown(sample.get(name, ''))) for name in ('step', 'prompt', 'text')] for sample in run.samples[::-1]]
  found = [f'step {step}<pre><b>{prompt}</b>{text}</pre>' for step, prompt, text in shown]
  earlier = f'<details><summary>{len(found) - SAMPLES} earlier ones</summary>{"".join(found[SAMPLES:])}</details>' * (len(found) > SAMPLES)
  return ''.join(found[:SAMPLES]) + earlier or 'none'


def _checkpoints(run: Run, out: pathlib.Path) -> str:
  """Links to the folders of checkpoints, relative to the page's folder."""
  folder = run.folder / 'checkpoints'
  steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []
  link = lambda step: urllib.parse.quote(os.path.relpath(folder / str(step), out).replace(os.sep, '/'))
  return ', '.join(f'<a href="./{link(step)}">{step:,}</a>' for step in steps) or 'none'


def page(workdirs: Sequence[pathlib.Path], out: pathlib.Path | None = None) -> str:
  """Returns the report of runs as HTML.

  Args:
    workdirs: folders of runs.
    out: the folder of the page, to which its links are relative; by default that of the first run.

  Raises:
    UserError: a file is damaged, or missing; then the error names the command that writes it.
  """
  names = [workdir.resolve().name for workdir in workdirs]
  runs = [read(workdir, str(workdir) if names.count(name) > 1 else name) for workdir, name in zip(workdirs, names)]
  one = runs[0]
  headed = lambda part: ''.join(f'<h3>{html.escape(run.name)}</h3>' * (len(runs) > 1) + part(run) for run in runs)
  facts = lambda run: (_table([*((name.replace('_', ' '), value) for name, value in run.facts.items()), ('training', _hours(run))])
                       + f'<p>Checkpoints: {_checkpoints(run, out or one.folder)}</p>')
  keys = [{'key': run.name, 'color': number % COLORS} for number, run in enumerate(runs)] if len(runs) > 1 else []
  data = json.dumps({'charts': charts(runs), 'clocks': [run.clock for run in runs], 'keys': keys}, allow_nan=False).replace('<', '\\u003c')
  here = pathlib.Path(__file__).parent
  part = lambda ending: (here / f'report.{ending}').read_text(encoding='utf-8')
  title = one.name if len(runs) == 1 else f'{len(runs)} runs: {", ".join(run.name for run in runs)}'
  return string.Template(part('html')).substitute(
    title=html.escape(title), css=part('css'), js=part('js'), data=data,
    verdict=html.escape(verdict(one.evaluation, one.baselines, one.rows) if len(runs) == 1 else _best(runs)),
    scores=_scores(one.evaluation, one.baselines, one.rows) if len(runs) == 1 else _compared(runs), samples=headed(_texts),
    run=headed(facts), changed=_changed(runs), config=''.join(map(_fields, runs)))


def main(_: None) -> None:
  """Writes the report of --workdir."""
  workdirs = [expanded(workdir, '--workdir') for workdir in flags.FLAGS.workdir]
  if missing := [workdir for workdir in workdirs if not workdir.is_dir()]:
    raise UserError('--workdir', str(missing[0]), 'a folder that gptjax.train made')
  if len(workdirs) > 1 and not flags.FLAGS.out:
    raise UserError('--out', None, 'the HTML file to write; with several runs it has no default')
  out = writable(flags.FLAGS.out or workdirs[0] / 'report.html', '--out' if flags.FLAGS.out else '--workdir')
  data = page(workdirs, out.parent).encode(errors='replace')
  try:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # so that the page is written atomically
      pathlib.Path(folder, 'report.html').write_bytes(data)
      pathlib.Path(folder, 'report.html').replace(out)
  except OSError as error:
    raise UserError('--out', str(out), f'a writable file ({error.strerror})') from error
  print(out)


if __name__ == '__main__':
  flags.DEFINE_multi_string('workdir', None, 'folder of a run; given several times, the runs are drawn over each other', required=True)
  flags.DEFINE_string('out', None, 'HTML file to write; default for one run: DIR/report.html')
  run(main, needs_config=False)
