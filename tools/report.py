"""Writes a report of a training run as one self-contained HTML file: python -m tools.report --workdir=DIR

The page depends only on the files in the workdir: equal runs give equal pages. Figures are inline SVG in the colours and fonts of the
page's style sheet, so they follow the reader's light or dark theme.
"""

import dataclasses
import html
import io
import json
import math
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from absl import flags
from jaxtyping import Float
from matplotlib import axes, figure, ticker

from gptjax.config import INT32_MAX, Config, UserError, describe, differences, from_json, run
from gptjax.files import expanded, writable

Row = Mapping[str, Any]


class _Kind(NamedTuple):
  """What is scored, and the figures that the page shows."""

  measure: tuple[str, str]
  """the field by which a model is compared, and its name"""
  fields: tuple[str, ...]
  names: tuple[str, ...]
  loss: str = 'nats per token'
  """unit"""


_KINDS = {
  'documents': _Kind(('bits_per_byte', 'bits per byte'), ('loss', 'perplexity', 'bits_per_byte', 'tokens'),
                     ('nats per token', 'perplexity', 'bits per byte', 'tokens scored')),
  'texts': _Kind(('accuracy', 'accuracy'), ('loss', 'accuracy', 'macro_f1', 'texts'),
                 ('nats per text', 'accuracy', 'macro F1', 'texts scored'), 'nats per text'),
  'margin': _Kind(('accuracy', 'pair accuracy'), ('loss', 'accuracy', 'margin', 'examples'),
                  ('nats per pair', 'pair accuracy', 'margin', 'pairs scored'), 'nats per pair'),
  'reward': _Kind(('reward', 'reward'), ('reward', 'pass@1', 'greedy', 'examples'), ('reward', 'pass@1', 'greedy', 'prompts scored'),
                  'of the policy')}
"""By a field that only results of this kind have; of documents none."""

# matplotlib has no CSS variables: each of these colours is a placeholder that is replaced by a variable in the SVG.
_COLORS = {name: f'#0a0b{n:02x}' for n, name in enumerate(
    ('ink', 'muted', 'line', 'bad', 'train', 'set0', 'set1', 'set2', 'set3'))}
_STYLE: Any = {
    'axes.edgecolor': _COLORS['muted'], 'axes.grid': True, 'axes.grid.axis': 'y', 'axes.labelcolor': _COLORS['muted'],
    'axes.linewidth': 0.6, 'axes.spines.left': False, 'axes.spines.right': False, 'axes.spines.top': False,
    'font.size': 9, 'grid.color': _COLORS['line'], 'grid.linewidth': 0.6, 'svg.fonttype': 'none',
    'text.color': _COLORS['ink'], 'text.parse_math': False, 'xtick.color': _COLORS['muted'],
    'ytick.color': _COLORS['muted'], 'ytick.left': False}
_CSS = '''
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1e2124; --muted: #686d73; --line: #e4e4de; --bad: #d8392f;
  --shade: #f3f3ee; --mark: #fec; --train: #2b7bc0; --set0: #d4611f; --set1: #35935c; --set2: #9461bd; --set3: #97720f }
@media (prefers-color-scheme: dark) { :root { --paper: #16181b; --ink: #e4e4e0; --muted: #9a9fa5; --line: #2e3237;
  --shade: #1f2226; --mark: #4a3d14; --train: #4d9be0; --set0: #e87a3c; --set1: #45ab70; --set2: #b184d8 } }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 50rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
h1, figure, dd { margin: 0; min-width: 0 }
h1 { font-size: 1rem; font-weight: 500; color: var(--muted) } h2 { margin: 2.8rem 0 .8rem; font-size: 1.2rem }
.verdict { margin: .2rem 0 1.4rem; font-size: 1.5rem; line-height: 1.3; font-weight: 600; text-wrap: pretty }
dl, .grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.6rem 1.4rem }
dl { grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); gap: .9rem; margin: 0 0 1.6rem; padding: .9rem 0;
  border: solid var(--line); border-width: 1px 0 }
dd { font-size: 1.2rem; font-weight: 600 }
dt, figcaption, th, summary, .samples { color: var(--muted); font-size: .85rem; font-weight: 400 }
figcaption * { display: inline-block; margin-right: .6em } figcaption b { color: var(--ink) }
svg { display: block; width: 100%; height: auto } svg text { font-family: system-ui, sans-serif !important }
.wide, .narrow { margin-bottom: 1.6rem } .narrow { display: none }
@media (max-width: 40rem) { .narrow { display: block } .wide { display: none } .verdict { font-size: 1.3rem } }
table { width: 100%; border-collapse: collapse; font-size: .9em } td:first-child { color: var(--muted); min-width: 7em }
th, td { padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
.bars * { min-width: 0 !important; white-space: nowrap; vertical-align: middle } .bars td:nth-child(3) { width: 99% }
i { display: block; height: .9rem; border-radius: 2px; background: var(--muted); opacity: .4 }
.model td { color: var(--ink) !important; font-weight: 600 } .model i { background: var(--train); opacity: 1 }
pre { margin: .3rem 0 1.3rem; padding: .8rem 1rem; overflow-y: auto; background: var(--shade); border-radius: 4px;
  font: .8rem/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap }
.samples pre { max-height: 18rem; color: var(--ink) } pre b { color: var(--train) }
mark { background: var(--mark); color: inherit; border-radius: 2px } summary { margin-top: .9rem; cursor: pointer }
'''
_PAGE = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{css}</style></head><body><h1>{title}</h1><p class="verdict">{verdict}</p>{scores}
<h2>Training</h2>{pictures}
<h2>Samples</h2><div class="samples">{samples}</div><h2>Run</h2>{run}
<h2>Config</h2>{changed}<details><summary>all fields</summary><pre>{config}</pre></details></body></html>
'''


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
  fields = _kind(found).fields
  _check_numbers(found, (*fields, 'step'), f'{path}:1')
  found['baselines'] = found.get('baselines') or {}
  _check_numbers(found['baselines'], found['baselines'], f'{path}: baselines')
  for group in ('sets', 'tags'):
    _check_numbers(found.setdefault(group, {}), (), f'{path}: {group}')
    for name, score in found[group].items():
      _check_numbers(score, fields, f'{path}: {group}: {name}')
  return found


def _kind(evaluation: Row, objective: str = '') -> _Kind:
  """The kind of results, or if there are none that of an objective."""
  expected = {'classification': 'texts', 'preference': 'margin', 'grpo': 'reward'}.get(objective, 'documents')
  return _KINDS[next((name for name in _KINDS if name in evaluation), 'documents' if evaluation else expected)]


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


def smooth(values: Float[np.ndarray, ' N']) -> Float[np.ndarray, ' N']:
  """Returns means over 1 % of the curve to either side, fewer near its start, where a wide window would lag."""
  index = np.arange(len(values))
  width = np.minimum(index, len(values) // 100)
  first, end = index - width, np.minimum(index + width + 1, len(values))
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[end] - sums[first]) / (end - first)


def _curve(ax: axes.Axes, steps: np.ndarray, values: np.ndarray, *, smoothed: bool = True, label: str = '') -> None:
  def plot(heights: np.ndarray, **style: Any) -> None:
    # The lowest and highest point of each narrow column suffice to draw it.
    columns = [part for part in np.array_split(np.arange(len(heights)), 500) if part.size]
    keep = sorted({part[pick(heights[part])] for part in columns for pick in (np.argmin, np.argmax)})
    ax.plot(steps[keep], heights[keep], color=_COLORS['train'], marker='o' if len(keep) == 1 else '', **style)

  steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
  if smoothed and len(values) >= 100:
    plot(values, alpha=0.3, linewidth=0.7)
    values = smooth(smooth(values))
  plot(values, linewidth=1.5, label=label)


def _tick(value: float, _: float) -> str:
  return f'{value:g}' if abs(value) < 1000 else ticker.EngFormatter(sep=' ')(value)


def _figure(name: str, note: str, unit: str, draw: Callable[[axes.Axes], None],
            inches: tuple[float, float] = (3.7, 2.2), *, zero: bool = False, kind: str = '') -> str:
  """Returns a plot over steps; its vertical axis starts at zero if `zero`, and is logarithmic for a wide range of values."""
  with matplotlib.rc_context(_STYLE | {'svg.hashsalt': kind + name}):  # ids are reproducible, and unique to a figure
    sheet = figure.Figure(figsize=inches, layout='constrained')
    ax = sheet.add_subplot(xlabel='step', ylabel=unit)
    draw(ax)
    (low, high), last, steps = ax.dataLim.intervaly, max(ax.dataLim.x1, 1), (1, 2, 5, 10)
    log = not zero and 0 < low < high / 20
    ax.set(yscale='log' if log else 'linear', ylim=(0 if zero else None, None), xlim=(-0.02 * last, 1.02 * last))
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=steps[:3]) if log else ticker.MaxNLocator(5, steps=steps))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=steps, integer=True))
    for axis in (ax.xaxis, ax.yaxis):
      axis.set_major_formatter(_tick)
    sheet.savefig(out := io.StringIO(), format='svg', transparent=True)
    keys = ''.join(f'<span style="color: {line.get_color()}">\u25cf {html.escape(label)}</span> '
                   for line in ax.get_lines() if re.match('[^_]', label := str(line.get_label())))
  svg = re.sub(r'.*?<svg[^>]*(viewBox="[^"]*")[^>]*>\s*<metadata>.*?</metadata>',
               rf'<svg \1 role="img" aria-label="{name}, {unit}">', out.getvalue(), count=1, flags=re.DOTALL)
  text = f'<figure class="{kind}"><figcaption><b>{name}</b> {keys}<span>{note}</span></figcaption>{svg}</figure>'
  for color, value in _COLORS.items():
    text = text.replace(value, f'var(--{color})')
  return re.sub('<g id="[^"]*"', '<g', text)


def _pictures(config: Config, rows: Sequence[Row], baselines: Mapping[str, float], kind: _Kind) -> str:
  def scores(ax: axes.Axes, metric: str) -> None:
    names = sorted({found[1] for row in rows for key in row if (found := re.fullmatch(f'eval/(?!tag/)(.+)/{metric}', key))})
    for n, name in enumerate(names):
      steps, values = series(rows, f'eval/{name}/{metric}')
      ax.plot(steps, values, 'o-', color=_COLORS[f'set{n % 4}'], markersize=3, linewidth=0.8, label=name)

  def losses(ax: axes.Axes) -> None:
    steps, values = series(rows, 'loss')
    _curve(ax, steps, values, label='training')
    if kind is not _KINDS['reward']:  # whose validation loss is another figure
      scores(ax, 'loss')
    xy = np.concatenate([np.empty((0, 2)), *(line.get_xydata() for line in ax.get_lines())])
    late = xy[np.isfinite(xy[:, 1]) & (xy[:, 0] > 0.02 * steps.max(initial=0)), 1]
    if len(late) >= 100 and np.ptp(late):  # the initial decrease would use most of the height
      low, margin = late.min(), 0.05 * np.ptp(late)
      ax.set_ylim(low - min(margin, abs(low) / 2), late.max() + margin)
    for first in steps[~np.isfinite(values)][:1]:
      ax.axvline(first, color=_COLORS['bad'], linestyle=':', label='not finite from here')

  def measured(ax: axes.Axes) -> None:
    if kind is _KINDS['reward']:
      _curve(ax, *series(rows, 'reward'), label='training')
    scores(ax, kind.measure[0])
    for index, (value, name) in enumerate(sorted((value, name) for name, value in baselines.items() if math.isfinite(value))):
      ax.axhline(value, color=_COLORS['muted'], linestyle='--', linewidth=0.8)
      ax.text(1 - 0.2 * index, value, f'{name}\n',  # beside each other, since their values may be close
              transform=ax.get_yaxis_transform(), ha='right', va='center', in_layout=False)

  def metric(name: str, *, smoothed: bool = True) -> Callable[[axes.Axes], None]:
    return lambda ax: _curve(ax, *series(rows, name), smoothed=smoothed)

  schedule, clip = config.optimizer.schedule, config.optimizer.clip
  clipped = f'before clipping to {clip:g}' if clip else 'never clipped'
  loss = 'Loss', '', kind.loss, losses
  return (_figure(*loss, (7.4, 3.3), kind='wide') + _figure(*loss, (3.7, 2.9), kind='narrow') + '<div class="grid">'
          + _figure('Validation', 'while training', kind.measure[1], measured)
          + _figure('Learning rate', schedule, 'rate', metric('learning_rate', smoothed=False), zero=True)
          + (_figure('Divergence', 'from the teacher', 'nats per token', metric('kl'), zero=True)
             if config.objective.kind == 'distillation' else '')
          + _figure('Gradient norm', clipped, 'global L2 norm', metric('grad_norm'))
          + _figure('Speed', 'all devices', 'tokens per second', metric('tokens_per_second'), zero=True) + '</div>')


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
  field, unit = _kind(evaluation).measure
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
  (field, unit), shown, names, _ = _kind(evaluation)
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
  sets = _table(named, 'set or tag', *names) if named else ''
  return f'<dl>{tiles}</dl>' + f'<table class="bars">{bars}</table>' * bool(baselines) + sets


def page(workdir: pathlib.Path) -> str:
  """Returns the report as HTML.

  Raises:
    UserError: a file is damaged, or missing; then the error names the command that writes it.
  """
  path = workdir / 'config.json'
  config, rows = from_json(_read(path), str(path)), _objects(workdir / 'metrics.jsonl', 'step')
  for n, row in enumerate(rows, 1):
    _check_numbers(row, row, f'{workdir / "metrics.jsonl"}:{n}')
  [header], evaluation = _objects(workdir / 'run.json'), _evaluation(workdir / 'evaluation.json')
  samples = _objects(workdir / 'samples.jsonl', 'step') if (workdir / 'samples.jsonl').is_file() else []
  baselines = {name: value for name, value in evaluation.get('baselines', {}).items() if not math.isnan(value)}
  for name, groups in evaluation.get('class_baselines', {}).items():  # all sets together, or the only one
    baselines[name] = [*groups.values()][-1]['accuracy']
  changed = differences(Config(), config)
  fields = [(line.partition(' = ')[0] in changed, html.escape(line)) for line in describe(config).split('\n')]
  texts = [[html.escape(_shown(sample.get(name, ''))) for name in ('step', 'prompt', 'text')] for sample in samples]
  return _PAGE.format(
      title=html.escape(workdir.resolve().name), css=_CSS, verdict=html.escape(verdict(evaluation, baselines, rows)),
      scores=_scores(evaluation, baselines, rows), pictures=_pictures(config, rows, baselines, _kind(evaluation, config.objective.kind)),
      samples=''.join(f'step {step}<pre><b>{prompt}</b>{text}</pre>' for step, prompt, text in texts[:-6:-1]) or 'none',
      run=_table((name.replace('_', ' '), value) for name, value in header.items()),
      changed=_table([(name, *values[::-1]) for name, values in changed.items()], 'field', 'this run', 'default'),
      config='\n'.join(f'<mark>{line}</mark>' if differs else line for differs, line in fields))


def main(_: None) -> None:
  """Writes the report of --workdir."""
  workdir = expanded(flags.FLAGS.workdir, '--workdir')
  if not workdir.is_dir():
    raise UserError('--workdir', str(workdir), 'a folder that gptjax.train made')
  out = writable(flags.FLAGS.out or workdir / 'report.html', '--out' if flags.FLAGS.out else '--workdir')
  data = page(workdir).encode(errors='replace')
  try:
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # so that the page is written atomically
      pathlib.Path(folder, 'report.html').write_bytes(data)
      pathlib.Path(folder, 'report.html').replace(out)
  except OSError as error:
    raise UserError('--out', str(out), f'a writable file ({error.strerror})') from error
  print(out)


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'folder of the run', required=True)
  flags.DEFINE_string('out', None, 'HTML file to write; default: DIR/report.html')
  run(main, needs_config=False)
