"""The report of a sweep: report.html with a table and pictures, and the best config as a recipe that runs."""

import collections
import functools
import html
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, figure, ticker

from gptjax.files import complete_lines
from gptjax.sweeps.queue import Queue
from gptjax.sweeps.results import Status, write_shared

_ENOUGH = 12
"""Trials from which on the importance of fields is shown."""
_CURVES = 200
"""Curves that are drawn: those of the best trials."""
_PAGE = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>
body {{ margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 62rem; color: #1e2124; background: #fdfdfb;
  font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums }}
h1 {{ font-size: 1rem; font-weight: 500; color: #686d73; margin: 0 }} h2 {{ margin: 2.2rem 0 .6rem; font-size: 1.2rem }}
.verdict {{ margin: .2rem 0 1.4rem; font-size: 1.4rem; line-height: 1.3; font-weight: 600; overflow-wrap: anywhere }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1.4rem }}
figure {{ margin: 0; min-width: 0 }} svg {{ display: block; width: 100%; height: auto }}
figcaption, th {{ color: #686d73; font-size: .85rem }}
.table {{ overflow: auto; max-height: 40rem }} table {{ border-collapse: collapse; font-size: .85rem; white-space: nowrap }}
th, td {{ padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e4e4de; text-align: left; font-weight: 400 }}
pre {{ padding: .8rem 1rem; background: #f3f3ee; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }}
.failed td {{ color: #d8392f }} tr.best td {{ font-weight: 600 }}
</style></head><body><h1>{title}</h1><p class="verdict">{verdict}</p>{body}</body></html>
'''
_STYLE: Any = {'font.size': 8, 'axes.spines.top': False, 'axes.spines.right': False, 'svg.fonttype': 'none', 'text.parse_math': False}


def write(queue: Queue, statuses: Sequence[Status], out: Path) -> None:
  """Writes report.html and, if a trial is done, best.py."""
  sweep, trials = queue.sweep, list(queue.trials)
  scores = [_score(status, sweep.metric) for status in statuses]
  order = sorted(range(len(trials)), key=lambda one: (statuses[one].name != 'done', math.isnan(scores[one]),
                                                      -scores[one] if sweep.maximize else scores[one]))
  done = [one for one in order if statuses[one].name == 'done' and math.isfinite(scores[one])]
  fields = [name for name in dict.fromkeys(name for trial in trials for name in trial.point)
            if len({repr(trial.point.get(name)) for trial in trials}) > 1]
  verdict, body = 'No trial is done', ''
  if done:
    best = trials[done[0]]
    recipe = _recipe(sweep.recipe, sweep.overrides | best.point)
    write_shared(out / 'best.py', recipe)
    given = ', '.join(f'{name} = {value}' for name, value in best.point.items())
    verdict = f'{sweep.metric} {scores[done[0]]:.4f} with {given or "no change"}'
    points, values = [trials[one].point for one in done], np.array([scores[one] for one in done])
    pictures = [_figure('Curves', 'training loss', 'loss', lambda ax: _curves(ax, [queue.folder(trials[one]) for one in done]), (5.4, 2.9))]
    if len(fields) > 1:
      pictures.append(_figure('Parallel coordinates', 'dark: best', '', lambda ax: _parallel(ax, fields, points, values), (5.4, 2.9)))
    one_slice = functools.partial(_slice, points=points, values=values)
    slices = [_figure(name, '', sweep.metric, functools.partial(one_slice, name=name), (3.4, 2.3)) for name in fields]
    body = ''.join(pictures) + f'<h2>Slices</h2><div class="grid">{"".join(slices)}</div>' * bool(slices)
    if len(done) >= _ENOUGH and fields:
      body += '<h2>Importance</h2><p>The fraction of the variance of the metric between the values of one field, or between four ranges of '
      body += f'them; fields that act together have less.</p>{_table([("field", "fraction"), *_importance(fields, points, values)], {})}'
  rows = [('trial', 'status', *fields, 'step', sweep.metric, 'error')]
  for one in order:
    status, point = statuses[one], trials[one].point
    rows.append((trials[one].name, status.name, *(point.get(name, '') for name in fields), status.metrics.get('step', ''),
                 '' if math.isnan(scores[one]) else f'{scores[one]:.4f}', status.error))
  classes = {row: statuses[one].name for row, one in enumerate(order, 1)} | ({1: 'best'} if done else {})
  body += f'<h2>Trials</h2><div class="table">{_table(rows, classes)}</div>'
  body += f'<h2>The best config, best.py</h2><pre>{html.escape(recipe)}</pre>' if done else ''
  title = html.escape(f'Sweep of {sweep.recipe} in {out.name}')
  write_shared(out / 'report.html', _PAGE.format(title=title, verdict=html.escape(verdict), body=body))


def _score(status: Status, metric: str) -> float:
  value = status.metrics.get(metric)
  return math.nan if value is None else float(value)


def _recipe(recipe: str, values: dict[str, Any]) -> str:
  lines = ''.join(f'    {name!r}: {value!r},\n' for name, value in values.items())
  return (f'"""The best config of a sweep of {recipe}."""\n\nfrom gptjax.config import Config, load, resolved\n\n\n'
          f'def get_config() -> Config:\n  return resolved(load({recipe!r}), {{\n{lines}  }})\n')


def _curves(ax: Any, folders: Sequence[Path]) -> None:
  folders = folders[:_CURVES]
  for index, folder in reversed(list(enumerate(folders))):
    lines = [json.loads(line) for line in complete_lines(folder / 'metrics.jsonl')]
    steps = [(line['step'], line['loss']) for line in lines if line.get('loss') is not None]
    color = colormaps['viridis'](index / max(len(folders) - 1, 1)) if index else '#d4611f'
    ax.plot(*zip(*steps[::max(1, len(steps) // 200)]), color=color, linewidth=1.6 if not index else 0.7, rasterized=len(folders) > 50)
  ax.set_xlabel('step; orange: the best trial')


def _places(values: Sequence[Any]) -> tuple[np.ndarray, list[str], bool]:
  """Places of values on an axis, their names where they are not numbers, and whether the axis is logarithmic."""
  if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
    found = np.array(values, float)
    return found, [], bool(found.min() > 0 and found.max() > 30 * found.min())
  names = sorted({str(value) for value in values})
  return np.array([names.index(str(value)) for value in values], float), names, False


def _slice(ax: Any, *, name: str, points: Sequence[dict], values: np.ndarray) -> None:
  places, names, log = _places([point.get(name, '') for point in points])
  ax.scatter(places, values, s=10, color='#2b7bc0', alpha=0.7, linewidths=0, rasterized=len(values) > 300)
  if log:
    ax.set_xscale('log')
    ax.xaxis.set_major_locator(ticker.LogLocator(numticks=5))
    ax.xaxis.set_major_formatter('{x:g}')
  if names:
    ax.set_xticks(range(len(names)), names, rotation=20 if len(names) > 3 else 0)
  elif len(set(places)) <= 8:
    ax.set_xticks(sorted(set(places)), [f'{value:g}' for value in sorted(set(places))])
    ax.xaxis.set_minor_locator(ticker.NullLocator())
  low, high = np.percentile(values, [0, 90])  # a diverged trial would use most of the height
  ax.set_ylim(low - 0.05 * (high - low + 1e-9), high + 0.3 * (high - low + 1e-9))


def _parallel(ax: Any, fields: Sequence[str], points: Sequence[dict], values: np.ndarray) -> None:
  columns = []
  for place, name in enumerate(fields):
    found, names, log = _places([point.get(name, '') for point in points])
    scaled = np.log(found) if log else found
    span = max(scaled.max() - scaled.min(), 1e-12)
    columns.append((scaled - scaled.min()) / span)
    ends = ((0, names[0]), (1, names[-1])) if names else ((0, f'{found.min():g}'), (1, f'{found.max():g}'))
    for height, text in ends:
      ax.annotate(text, (place, height), xytext=(0, 6 if height else -12), textcoords='offset points', ha='center', fontsize=7)
  heights, rank = np.stack(columns, 1), np.argsort(np.argsort(values)) / max(len(values) - 1, 1)
  for one in np.argsort(-rank):
    ax.plot(range(len(fields)), heights[one], color=colormaps['viridis'](rank[one]), linewidth=0.8, alpha=1 - 0.8 * rank[one],
            rasterized=len(values) > 100)
  ax.set_xticks(range(len(fields)), [name.rpartition('.')[2] for name in fields])
  ax.set(yticks=[], ylim=(-0.15, 1.15))


def _importance(fields: Sequence[str], points: Sequence[dict], values: np.ndarray) -> list[tuple[str, str]]:
  ranks, found = np.argsort(np.argsort(values)), {}
  for name in fields:
    places, _, _ = _places([point.get(name, '') for point in points])
    groups = places if len(set(places)) <= 6 else np.searchsorted(np.quantile(places, [0.25, 0.5, 0.75]), places)
    members = collections.defaultdict(list)
    for group, rank in zip(groups, ranks):
      members[group].append(rank)
    between = sum(len(one) * (np.mean(one) - ranks.mean())**2 for one in members.values())
    found[name] = between / max(((ranks - ranks.mean())**2).sum(), 1e-12)
  return [(name, f'{value:.2f}') for name, value in sorted(found.items(), key=lambda item: -item[1])]


def _figure(title: str, note: str, label: str, draw: Callable[[Any], None], inches: tuple[float, float]) -> str:
  import matplotlib
  with matplotlib.rc_context(_STYLE | {'svg.hashsalt': title}):
    sheet = figure.Figure(figsize=inches, layout='constrained', dpi=150)
    ax = sheet.add_subplot(ylabel=label)
    draw(ax)
    sheet.savefig(out := io.StringIO(), format='svg', transparent=True)
  svg = re.sub(r'.*?<svg[^>]*(viewBox="[^"]*")[^>]*>\s*<metadata>.*?</metadata>', r'<svg \1 role="img">', out.getvalue(), count=1,
               flags=re.DOTALL)
  return f'<figure><figcaption><b>{html.escape(title)}</b> {note}</figcaption>{svg}</figure>'


def _table(rows: Sequence[Sequence[Any]], classes: dict[int, str]) -> str:
  cell = lambda row: 'th' if not row else 'td'
  return '<table>' + ''.join(
    f'<tr class="{classes.get(number, "")}">' + ''.join(f'<{cell(number)}>{html.escape(str(value))}</{cell(number)}>' for value in row)
    + '</tr>' for number, row in enumerate(rows)) + '</table>'
