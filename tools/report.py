"""`python -m tools.report --workdir=DIR`: how a training run went, as one HTML file that loads nothing else.

The page follows from the files in the workdir alone: equal runs give equal pages. Pictures are SVG inside the page, in
the colours and fonts of its style sheet, so they follow the reader's light or dark theme.
"""

import html
import io
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from absl import flags
from jaxtyping import Float
from matplotlib import axes, figure, ticker

from gptjax.config import Config, UserError, describe, differences, from_json, run

Row = Mapping[str, Any]

# matplotlib knows no CSS variables: each of these colours stands for one, and is replaced by it in the SVG.
_COLORS = {name: f'#0a0b{n:02x}' for n, name in enumerate(
    ('ink', 'muted', 'line', 'bad', 'train', 'set0', 'set1', 'set2', 'set3'))}
_STYLE = {
    'axes.edgecolor': _COLORS['muted'], 'axes.grid': True, 'axes.grid.axis': 'y', 'axes.labelcolor': _COLORS['muted'],
    'axes.linewidth': 0.6, 'axes.spines.left': False, 'axes.spines.right': False, 'axes.spines.top': False,
    'axes.unicode_minus': False, 'axes.xmargin': 0.02, 'font.size': 9, 'grid.color': _COLORS['line'],
    'grid.linewidth': 0.6, 'legend.frameon': False, 'svg.fonttype': 'none', 'text.color': _COLORS['ink'],
    'text.parse_math': False, 'xtick.color': _COLORS['muted'], 'ytick.color': _COLORS['muted'], 'ytick.left': False}
_CSS = '''
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1e2124; --muted: #686d73; --line: #e4e4de; --shade: #f3f3ee;
  --mark: #fff0c2; --bad: #c2271f; --train: #2267a8; --set0: #cf5a17; --set1: #2f8a57; --set2: #8a4fb0; --set3: #a3741a }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e4e4e0; --muted: #9a9fa5; --line: #2e3237; --shade: #1f2226; --mark: #4a3d14;
    --bad: #ff7b72; --train: #6cb0f0; --set0: #f2935a; --set1: #6cc795; --set2: #c79be6; --set3: #d9b35c } }
body { margin: 0 auto; padding: 2rem 1.1rem 4rem; max-width: 50rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1rem; font-weight: 500; color: var(--muted) }
h2 { margin: 2.8rem 0 .8rem; font-size: 1.2rem }
.verdict { margin: .2rem 0 1.4rem; font-size: 1.5rem; line-height: 1.3; font-weight: 600; text-wrap: pretty }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.6rem, 1fr)); gap: .9rem; margin: 0 0 1.6rem;
  padding: .9rem 0; border: solid var(--line); border-width: 1px 0 }
dd { margin: 0; font-size: 1.3rem; font-weight: 600 }
dt, figcaption, th, summary { color: var(--muted); font-size: .85rem; font-weight: 400 }
figure { margin: 0; min-width: 0 }
figcaption b { color: var(--ink); margin-right: .4em }
svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.6rem 1.4rem }
.narrow { display: none }
@media (max-width: 40rem) { .narrow { display: block } .wide { display: none } .verdict { font-size: 1.3rem } }
table { width: 100%; border-collapse: collapse; font-size: .9rem }
th, td { padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td:first-child { color: var(--muted); min-width: 6.5rem }
.bars td { white-space: nowrap; vertical-align: middle }
.bars td:nth-child(3) { width: 100% }
i { display: block; height: .9rem; border-radius: 2px; background: var(--muted); opacity: .4 }
.model td { color: var(--ink) !important; font-weight: 600 }
.model i { background: var(--train); opacity: 1 }
pre { margin: .3rem 0 1.3rem; padding: .8rem 1rem; max-height: 24rem; overflow-y: auto; background: var(--shade);
  font: .8rem/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; border-radius: 4px }
details pre { max-height: none }
pre b { color: var(--train) }
mark { background: var(--mark); color: inherit; border-radius: 2px }
summary { margin-top: .9rem; cursor: pointer }
'''


def _read(path: pathlib.Path) -> str:
  if not path.is_file():
    command = 'evaluate' if path.name == 'evaluation.json' else 'train --config=configs/NAME.py'
    made_by = f'python -m gptjax.{command} --workdir={path.parent}'
    raise UserError(str(path), 'no such file', f'the file that `{made_by}` writes')
  return path.read_text(encoding='utf-8', errors='replace')


def _object(text: str, where: str, *required: str) -> dict[str, Any]:
  try:
    found = json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(where, text[:80], f'JSON ({error.msg})') from error
  if not isinstance(found, dict):
    raise UserError(where, text[:80], 'a JSON object')
  for name in required:
    if not isinstance(found.get(name, ''), (int, float)):
      raise UserError(f'{where}: {name}', found.get(name), 'a number')
  return found


def _objects(path: pathlib.Path) -> list[Row]:
  *lines, last = _read(path).split('\n')  # the run may still be writing the last one
  lines += [last] * last.endswith('}')
  return [_object(line, f'{path}:{number}', 'step') for number, line in enumerate(lines, 1) if line.strip()]


def series(rows: Iterable[Row], name: str) -> tuple[Float[np.ndarray, ' N'], Float[np.ndarray, ' N']]:
  """Returns a metric's steps, ascending, and values (null: NaN); of steps that ran again after a resume, the later."""
  points: list[tuple[float, float]] = []
  for row in rows:
    if name in row:
      while points and points[-1][0] >= row['step']:
        points.pop()
      points.append((row['step'], row[name]))
  steps, values = np.array(points, float).reshape(-1, 2).T
  return steps, values


def smooth(values: Float[np.ndarray, ' N']) -> Float[np.ndarray, ' N']:
  """Returns means over 2 % of the curve to either side, fewer near its start, where a wide window would lag."""
  index = np.arange(len(values))
  width = np.minimum(index, len(values) // 50)
  first, end = index - width, np.minimum(index + width + 1, len(values))
  sums = np.concatenate([[0.0], np.cumsum(values)])
  return (sums[end] - sums[first]) / (end - first)


def _curve(ax: axes.Axes, steps: np.ndarray, values: np.ndarray, *, smoothed: bool = True, label: str = '') -> None:
  def plot(heights: np.ndarray, **style: Any) -> None:
    # The lowest and the highest point of each column of pixels look the same as all points.
    columns = np.array_split(np.arange(len(heights)), min(len(heights), 500) or 1)
    keep = sorted({at for column in columns if column.size
                   for at in (column[heights[column].argmin()], column[heights[column].argmax()])})
    ax.plot(steps[keep], heights[keep], color=_COLORS['train'], marker='o' if len(keep) == 1 else '', **style)

  steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
  if smoothed and len(values) >= 100:
    plot(values, alpha=0.3, linewidth=0.7)
    values = smooth(values)
  plot(values, linewidth=1.5, label=label)


def _tick(value: float, _: int) -> str:
  return f'{value:g}' if abs(value) < 1000 else ticker.EngFormatter(sep=' ')(value)


def _svg(name: str, unit: str, draw: Callable[[axes.Axes], None], inches: tuple[float, float]) -> str:
  """Returns a picture over steps as an <svg> element."""
  with matplotlib.rc_context(_STYLE | {'svg.hashsalt': f'{name} {inches}'}):  # ids: the same each time, none twice
    ax = figure.Figure(figsize=inches, layout='constrained').add_subplot(xlabel='step', ylabel=unit)
    draw(ax)
    low, high = ax.dataLim.intervaly
    log = ax.get_autoscaley_on() and 0 < low < high / 20
    ax.set_yscale('log' if log else 'linear')
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if log else ticker.MaxNLocator(5))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    for axis in (ax.xaxis, ax.yaxis):
      axis.set_major_formatter(_tick)
    if ax.get_legend_handles_labels()[1]:
      ax.legend(loc='upper right')
    ax.figure.savefig(out := io.StringIO(), format='svg', transparent=True)
  label = html.escape(f'{name} in {unit} over steps')
  svg = re.sub(r'.*?<svg[^>]*(viewBox="[^"]*")[^>]*>\s*<metadata>.*?</metadata>',
               rf'<svg \1 role="img" aria-label="{label}">', out.getvalue(), count=1, flags=re.DOTALL)
  for color, value in _COLORS.items():
    svg = svg.replace(value, f'var(--{color})')
  return re.sub('<g id="[^"]*"', '<g', svg)


def _pictures(config: Config, rows: Sequence[Row], sets: Sequence[str]) -> str:
  def losses(ax: axes.Axes) -> None:
    steps, values = series(rows, 'loss')
    _curve(ax, steps, values, label='training')
    for n, name in enumerate(sets):
      at, scores = series(rows, f'eval/{name}/loss')
      finite = np.isfinite(scores)
      ax.plot(at[finite], scores[finite], 'o-', color=_COLORS[f'set{n % 4}'], markersize=3, linewidth=0.8, label=f'on {name}')
    if not np.isfinite(values).all():
      ax.axvline(steps[~np.isfinite(values)][0], color=_COLORS['bad'], linestyle=':', label='first that is not finite')

  def metric(name: str, smoothed: bool, floor: float | None = None) -> Callable[[axes.Axes], None]:
    def draw(ax: axes.Axes) -> None:
      _curve(ax, *series(rows, name), smoothed=smoothed)
      if floor is not None:
        ax.set_ylim(bottom=floor)
    return draw

  clip = f'before clipping to {config.optimizer.clip:g}' if config.optimizer.clip else 'not clipped'
  entries = [
      ('wide', 'Loss', 'smoothed, with single steps behind', 'nats per token', losses, (7.4, 3.3)),
      ('narrow', 'Loss', 'smoothed, with single steps behind', 'nats per token', losses, (3.7, 2.9)),
      ('', 'Learning rate', config.optimizer.schedule, 'rate', metric('learning_rate', False), (3.7, 2.1)),
      ('', 'Gradient norm', clip, 'global L2 norm', metric('grad_norm', True), (3.7, 2.1)),
      ('', 'Speed', 'all devices together', 'tokens per second', metric('tokens_per_second', True, 0), (3.7, 2.1))]
  figures = [f'<figure class="{kind}"><figcaption><b>{name}</b> {note}</figcaption>{_svg(name, unit, draw, inches)}</figure>'
             for kind, name, note, unit, draw, inches in entries]
  return ''.join(figures[:2]) + f'<div class="grid">{"".join(figures[2:])}</div>'


def _shown(value: object) -> str:
  """Returns the value for a reader: four digits of a float, thousands apart."""
  if isinstance(value, float) and not 1e4 <= abs(value) < 1e12:
    return f'{value:.4g}'
  if isinstance(value, str) or not isinstance(value, (int, float)) or isinstance(value, bool):
    return value if isinstance(value, str) else json.dumps(value)
  return f'{value:,.0f}'


def _table(rows: Iterable[Sequence[object]], *head: str) -> str:
  lines = [('th', head)] * bool(head) + [('td', row) for row in rows]
  return '<table>' + ''.join(
      '<tr>' + ''.join(f'<{tag}>{html.escape(_shown(cell))}</{tag}>' for cell in cells) + '</tr>'
      for tag, cells in lines) + '</table>'


def _against(ours: float, yardstick: float) -> str:
  if not math.isfinite(ours) or not 0 < yardstick < math.inf:
    return ''
  percent = round(100 * (ours / yardstick - 1))
  return f'{abs(percent)} % {"above" if percent > 0 else "below"}' if percent else 'level with'


def verdict(evaluation: Row, rows: Iterable[Row]) -> str:
  """Returns the outcome in a sentence: the score, how it stands to its yardsticks, and whatever makes it doubtful."""
  score, at = evaluation['bits_per_byte'], _shown(evaluation['step'])
  steps, losses = series(rows, 'loss')
  text = f'Validation {score:.2f} bits per byte at step {at}'
  if not math.isfinite(score):
    text = f'The validation loss is not finite at step {at}'
  compared = [f'{words} {name}' for name, value in evaluation['yardsticks'].items() if (words := _against(score, value))]
  text += f', {" and ".join(compared)}' if compared else ''
  bad = steps[~np.isfinite(losses)]
  if not steps.size:
    text += ', but metrics.jsonl holds no training step'
  elif bad.size:
    text += f', but {bad.size:,} of {steps.size:,} logged training losses are not finite, the first at step {bad[0]:,.0f}'
  elif evaluation['step'] < steps[-1]:
    text += f', and training has gone on to step {steps[-1]:,.0f} since'
  return text + '.'


def _scores(evaluation: Row, rows: Sequence[Row]) -> str:
  """Returns the final figures, and those in bits per byte as bars next to their yardsticks."""
  found = {'bits per byte': evaluation['bits_per_byte'], 'perplexity': evaluation['perplexity'],
           'nats per token': evaluation['loss'], 'tokens scored': evaluation['tokens']}
  for name, metric, scale in (('tokens/s, median', 'tokens_per_second', 1), ('MFU in %, median', 'mfu', 100)):
    values = series(rows, metric)[1]
    if np.isfinite(values).any():
      found[name] = scale * float(np.median(values[np.isfinite(values)]))
  tiles = ''.join(f'<div><dt>{name}</dt><dd>{_shown(value)}</dd></div>' for name, value in found.items())
  bars = {'this model': evaluation['bits_per_byte']} | evaluation['yardsticks']
  longest = max((value for value in bars.values() if value < math.inf), default=1)
  lines = [f'<tr{" class=model" * (n == 0)}><td>{html.escape(name)}</td><td>{value:.3f}</td><td>'
           + f'<i style="width: {100 * value / longest:.1f}%"></i>' * (0 <= value <= longest) +
           f'</td><td>{_against(bars["this model"], value) if n else ""}</td></tr>' for n, (name, value) in enumerate(bars.items())]
  head = '<tr><th></th><th>bits per byte</th><th></th><th>the model is</th></tr>'
  return f'<dl>{tiles}</dl><table class="bars">{head}{"".join(lines)}</table>'


def page(workdir: pathlib.Path) -> str:
  """Returns the report as HTML.

  Raises:
    UserError: a file is missing or damaged; it names the file, and the command that makes it.
  """
  file = workdir / 'config.json'
  config = from_json(_read(file), str(file))
  rows, header = _objects(workdir / 'metrics.jsonl'), _object(_read(workdir / 'run.json'), str(workdir / 'run.json'))
  file = workdir / 'evaluation.json'
  evaluation = _object(_read(file), str(file), 'loss', 'perplexity', 'bits_per_byte', 'tokens', 'step')
  return ''
