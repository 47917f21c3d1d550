"""Plans beside compiled programs: python -m experiments.parallelism.analyse --layouts=CSV --pod=CSV --picture=PNG"""

import csv
from pathlib import Path

from absl import flags

from experiments.runs import table
from gptjax import config as configs
from gptjax.files import expanded, save_figure, writable
from gptjax.sharding.chips import GIB

_LAYOUTS = flags.DEFINE_string('layouts', None, 'table of measure.py', required=True)
_POD = flags.DEFINE_string('pod', None, 'table of measure.py --topology=...')
_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture')
Row = dict[str, str]
BOTH = ('planned', 'compiled')
KINDS = ('all-reduce', 'reduce-scatter', 'all-gather', 'all-to-all', 'collective-permute')


def main(_: object) -> None:
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  rows = read(expanded(_LAYOUTS.value, '--layouts'), 'compiled rest')
  pod = read(expanded(_POD.value, '--pod'), 'bottleneck') if _POD.value else []
  print('\n\n'.join([memory(rows), sent(rows), idle(rows), *([planned(pod)] if pod else [])]))
  if picture:
    draw(rows, picture)


def read(path: Path, column: str) -> list[Row]:
  """The rows of a table of measure.py that has a column."""
  try:
    with path.open(newline='', encoding='utf-8') as file:
      found = csv.DictReader(file, strict=True)
      rows, columns = list(found), found.fieldnames or []
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise configs.UserError(str(path), str(error), 'a table of experiments.parallelism.measure') from None
  if not rows or column not in columns or any(None in row or None in row.values() for row in rows):
    raise configs.UserError(str(path), ', '.join(columns)[:60], f'a table of experiments.parallelism.measure, with a column {column!r}')
  return rows


def pair(row: Row, *names: str) -> tuple[float, float]:
  """Sums of columns, planned and compiled."""
  plan, compiled = (sum(float(row[f'{source} {name}']) for name in names) for source in BOTH)
  return plan, compiled


def ratio(found: tuple[float, float]) -> str:
  """Planned over compiled; empty if the program has none."""
  return f'{found[0] / found[1]:.2f}' if found[1] else ''


def _cells(found: tuple[float, float], unit: float) -> list[str]:
  return [f'{found[0] / unit:.2f}', f'{found[1] / unit:.2f}', ratio(found)]


def memory(rows: list[Row]) -> str:
  """Memory per device in MiB, and the loss, in Markdown."""
  header = ['layout', 'axes']
  for name in ('state', 'rest', 'all'):
    header += [f'{name}: planned', 'compiled', 'ratio']
  parts = (('state',), ('rest',), ('state', 'rest'))
  return table([*header, 'loss'], ([row['layout'], row['devices'], *(cell for names in parts for cell in _cells(pair(row, *names), 2**20)),
                                    row['loss']] for row in rows))


def sent(rows: list[Row]) -> str:
  """Megabytes that a device sends per step, in Markdown."""
  def cell(row: Row, kind: str) -> str:
    found = pair(row, kind)
    return f'{found[0] / 1e6:.2f} / {found[1] / 1e6:.2f}' if max(found) >= 5e3 else ''
  return table(['layout', *(f'{kind}: planned / compiled' for kind in KINDS), 'all: planned', 'compiled', 'ratio'],
               ([row['layout'], *(cell(row, kind) for kind in KINDS), *_cells(pair(row, *KINDS), 1e6)] for row in rows))


def idle(rows: list[Row]) -> str:
  """Idle shares of pipelines, in Markdown."""
  return table(['idle share of the ticks', 'planned', 'compiled', 'ratio', 'by the paper'],
               ([row['layout'], *(f'{one:.1%}' for one in pair(row, 'idle')), ratio(pair(row, 'idle')),
                 f'{float(row["idle by the paper"]):.1%}'] for row in rows if pair(row, 'idle')[0]))


def planned(pod: list[Row]) -> str:
  """The plans for a machine, in Markdown."""
  axes = [name for name in pod[0] if name.startswith('sent over ') and any(float(row[name]) for row in pod)]
  def cells(row: Row) -> list[str]:
    total, available = float(row['total']), float(row['available'])
    return [row['layout'], f'{float(row["state"]) / GIB:.1f}', f'{float(row["activations"]) / GIB:.1f}', f'{total / GIB:.1f}',
            'yes' if total <= available else 'no', *(f'{float(row[name]) / 1e9:.1f}' if float(row[name]) else '' for name in axes),
            f'{float(row["bubble"]):.1%}' if float(row['bubble']) else '', row['seconds at best'], row['seconds in sequence'],
            row['bottleneck']]
  return table(['layout', 'state, GiB', 'activations, GiB', 'all, GiB', 'fits', *(f'{name}, GB' for name in axes), 'idle',
                'seconds at best', 'seconds in sequence', 'bottleneck'], map(cells, pod))


def draw(rows: list[Row], path: Path) -> None:
  """Writes a PNG: for each layout the planned bar above the compiled one, of memory, traffic and idle time."""
  from matplotlib.figure import Figure
  panels = {'state, MiB': (('state',), 2**20), 'other memory, MiB': (('rest',), 2**20), 'sent per step, MB': (KINDS, 1e6),
            'idle share of the pipeline': (('idle',), 1.0)}
  figure = Figure(figsize=(9, 6), layout='constrained')
  places = range(len(rows))
  for axes, (title, (names, unit)) in zip(figure.subplots(1, len(panels), sharey=True), panels.items()):
    for shift, source, color in ((-0.2, 'planned', 'tab:blue'), (0.2, 'compiled', 'tab:orange')):
      values = [pair(row, *names)[BOTH.index(source)] / unit for row in rows]
      axes.barh([place + shift for place in places], values, 0.4, label=source, color=color)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[['top', 'right']].set_visible(False)
  axes = figure.axes[0]
  axes.set_yticks(places, [row['layout'] for row in rows])
  axes.invert_yaxis()
  figure.axes[-1].legend(fontsize=8, frameon=False, loc='upper right')
  save_figure(figure, path, dpi=100)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
