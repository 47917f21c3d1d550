"""A plan as text with tables, as JSON, and as a picture."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from gptjax.config import AXIS_NAMES
from gptjax.files import save_figure
from gptjax.planning.collectives import PADDED, totals
from gptjax.planning.estimate import Estimate
from gptjax.planning.roofline import DAY
from gptjax.planning.search import settings
from gptjax.planning.volumes import by_axis, schedule_of
from gptjax.sharding import abstract_mesh
from gptjax.sharding import describe as describe_mesh
from gptjax.sharding.chips import GIB

SMALLEST_SHOWN = 1e-3
"""The table leaves out rows whose bytes are below this fraction of the largest; the JSON has them."""


def describe(one: Estimate) -> str:
  """A plan in words and tables."""
  return '\n'.join([_head(one), '', _memory(one), '', _volumes(one), '', _bounds(one), '', _verdict(one)])


def _head(one: Estimate) -> str:
  config = one.config
  active = f', {one.active / 1e9:.2f}B active per token' if config.model.experts else ''
  parts = f' in {config.microbatches} microbatches' if config.microbatches > 1 else ''
  schedule = schedule_of(config, one.sizes)
  chunks = f' with {schedule.chunks} chunks' if schedule.chunks > 1 else ''
  pipeline = '' if schedule.stages == 1 else f', {config.pipeline.schedule}{chunks} (bubble {schedule.bubble:.1%})'
  return (f'{one.topology.name}: {one.topology.devices} devices, mesh {describe_mesh(abstract_mesh(one.sizes))}{pipeline}, ZeRO stage '
          f'{config.zero_stage}, remat {config.compute.remat}\n{one.parameters / 1e9:.2f}B parameters{active}, {config.compute.dtype}, '
          f'{config.batch_size} x {config.data.context} tokens per step{parts}, {one.steps:,} steps, {one.tokens:.4g} tokens')


def _memory(one: Estimate) -> str:
  analytic, compiled, chip = one.memory, one.compiled, one.topology.chip
  gib = lambda count: f'{count / GIB:.2f}'
  both = [] if compiled is None else [
    ('state and batch (arguments)', gib(analytic.state), gib(compiled.arguments)),
    ('temporaries and results', gib(analytic.total - analytic.state), gib(compiled.temporaries + compiled.outputs)),
    ('code', gib(0), gib(compiled.code))]
  total = [('total', gib(analytic.total), gib(compiled.total) if compiled else ''),
           ('of the memory', f'{analytic.total / chip.memory:.1%}', f'{compiled.total / chip.memory:.1%}' if compiled else '')]
  return _table(('bytes per device', 'analytic GiB', 'compiled GiB'),
                [(name, gib(count), '') for name, count in dataclasses.asdict(analytic).items()], both, total)


def _volumes(one: Estimate) -> str:
  analytic, found = totals(one.analytic), totals(one.found)
  if not analytic and not found:
    return 'Nothing is sent between devices.'
  larger = {key: max(analytic.get(key, 0.0), found.get(key, 0.0)) for key in {*analytic, *found}}
  gigabytes = lambda sums, key: f'{sums[key] / 1e9:.3f}' if key in sums else ''
  rows = [(kind, ', '.join(axes), dtype, gigabytes(analytic, (axes, kind, dtype)), gigabytes(found, (axes, kind, dtype)))
          for axes, kind, dtype in sorted(larger, key=lambda key: (key[0], -larger[key]))
          if larger[axes, kind, dtype] >= SMALLEST_SHOWN * max(larger.values())]
  ours, theirs = by_axis(one.analytic), by_axis(one.found)
  sums = [('total', axis, '', gigabytes(ours, axis), gigabytes(theirs, axis)) for axis in sorted({*ours, *theirs})]
  padded = sum(collective.total for collective in one.found if collective.why == PADDED)
  note = f'\nOf the all-reduces {padded / 1e9:.1f} GB are in place of all-gathers, which would send half the bytes.'
  return (_table(('sent by a device per step', 'axes', 'dtype', 'analytic GB', 'compiled GB'), rows, sums)
          + (note if padded > 0.05 * sum(theirs.values()) else ''))


def _bounds(one: Estimate) -> str:
  bounds = one.bounds
  both = (('perfect overlap (max)', bounds.overlapped), ('no overlap (sum)', bounds.sequential))
  return _table(('at best, per step', 'ms', 'MFU'), [(name, f'{seconds * 1e3:.1f}', '') for name, seconds in bounds.seconds.items()],
                [(name, f'{seconds * 1e3:.1f}', f'{bounds.mfu(seconds):.1%}') for name, seconds in both])


def _verdict(one: Estimate) -> str:
  bounds, chips = one.bounds, one.topology.chips
  fits = (f'does not fit: {one.refusal}' if one.refusal else
          f'{"fits" if one.fits else "does not fit"}, {"compiled" if one.compiled else "analytic"}: {one.needed / GIB:.1f} of the '
          f'{one.available / GIB:.1f} GiB that a program may use')
  per_day = one.tokens / one.steps / bounds.overlapped * DAY
  days = one.days(bounds.overlapped)
  return (f'{fits}\n{bounds.flops:.4g} FLOPs per step and device ({bounds.executed:.4g} with recomputation); {bounds.bottleneck} is the '
          f'bottleneck\nat best {per_day:.3g} tokens per day: {one.tokens:.4g} tokens take {days:.1f} days on {chips} '
          f'chip{"s" * (chips > 1)}, {days * 24 * chips:,.0f} chip-hours ({one.days(bounds.sequential):.1f} days if nothing overlaps)\n'
          f'expect about {one.days(bounds.usual):.1f} days, at {bounds.mfu(bounds.usual):.0%} MFU: published runs reach 28 to 46 %')


def ranking(ranked: Sequence[Estimate], count: int = 10) -> str:
  """The best candidates of a search, one per row."""
  names = [name for name in settings(ranked[0]) if not name.startswith('mesh.') or any(settings(one)[name] != 1 for one in ranked)]
  rows = [(str(place), *(str(settings(one)[name]) for name in names), f'{one.needed / GIB:.1f}{"" if one.fits else " !"}',
           f'{one.bounds.overlapped * 1e3:.0f}', f'{one.bounds.sequential * 1e3:.0f}', f'{one.bounds.mfu(one.bounds.overlapped):.1%}',
           one.bounds.bottleneck) for place, one in enumerate(ranked[:count], 1)]
  fitting = sum(one.fits for one in ranked)
  return (f'{len(ranked)} layouts, {fitting} that fit{"" if fitting else "; ! does not fit"}\n'
          + _table(('', *names, 'GiB', 'ms at best', 'ms in sequence', 'MFU at best', 'bottleneck'), rows))


def as_json(one: Estimate) -> dict[str, Any]:
  """All of a plan as plain data; bytes, seconds and FLOPs are per device and step."""
  bounds = one.bounds
  program = one.compiled and {
    name: getattr(one.compiled, name) for name in ('arguments', 'temporaries', 'outputs', 'code', 'total', 'seconds')}
  rows = lambda found: [dataclasses.asdict(collective) | {'total': collective.total} for collective in found]
  return {
    'topology': one.topology.name, 'devices': one.topology.devices, 'chips': one.topology.chips, 'settings': settings(one),
    'parameters': one.parameters, 'active': one.active, 'steps': one.steps, 'tokens': one.tokens, 'fits': one.fits, 'refusal': one.refusal,
    'available': one.available, 'memory': dataclasses.asdict(one.memory) | {'total': one.memory.total}, 'compiled': program,
    'collectives': {'analytic': rows(one.analytic), 'compiled': rows(one.found)},
    'flops': bounds.flops, 'executed_flops': bounds.executed, 'seconds': bounds.seconds, 'bottleneck': bounds.bottleneck,
    'bounds': {name: {'seconds': seconds, 'mfu': bounds.mfu(seconds), 'days': one.days(seconds),
                      'chip_hours': one.days(seconds) * 24 * one.topology.chips}
               for name, seconds in (('overlapped', bounds.overlapped), ('sequential', bounds.sequential), ('usual', bounds.usual))},
  }


def draw(plans: Sequence[Estimate], path: Path) -> None:
  """Writes a PNG: one bar per plan with its analytic parts, a mark at the compiled total, and a line at the chip's memory."""
  from matplotlib import colormaps
  from matplotlib.figure import Figure

  figure = Figure(figsize=(max(4.0, 1.6 + 1.1 * len(plans)), 4.8), layout='constrained')
  axes = figure.subplots()
  places = range(len(plans))
  parts = {name: np.array([getattr(one.memory, name) for one in plans]) / GIB for name in dataclasses.asdict(plans[0].memory)}
  bottom = np.zeros(len(plans))
  for (name, heights), color in zip(parts.items(), colormaps['viridis'](np.linspace(0, 1, len(parts)))):
    axes.bar(places, heights, 0.7, bottom, label=name, color=color)
    bottom = bottom + heights
  compiled = [(place, one.compiled.total / GIB) for place, one in zip(places, plans) if one.compiled]
  if compiled:
    axes.plot(*zip(*compiled), 'k_', markersize=28, label='compiled')
  chip = plans[0].topology.chip.memory / GIB
  axes.axhline(chip, color='crimson', linewidth=1, label=f'{chip:.0f} GiB per device')
  labels = []
  for one in plans:
    chosen = settings(one)
    mesh, work = ' x '.join(str(size) for size in one.sizes.values()), f'{chosen["compute.remat"]}, {chosen["microbatches"]}'
    labels.append(f'{mesh}\nZeRO {chosen["zero_stage"]}\n{work}')
  axes.set_xticks(places, labels, fontsize=8)
  axes.set_xlabel(f'{" x ".join(AXIS_NAMES)}, ZeRO stage, remat and microbatches')
  axes.set_ylabel('GiB per device')
  axes.set_title(f'{plans[0].parameters / 1e9:.1f}B parameters on {plans[0].topology.name}', fontsize=10)
  axes.legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  save_figure(figure, path, dpi=150, bbox_inches='tight')


def _table(columns: Sequence[str], *sections: Iterable[Sequence[str]]) -> str:
  """A table as text, its sections separated from each other."""
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
  for column in columns:
    text = column in ('', 'axes', 'dtype', 'bottleneck', columns[0])
    table.add_column(column, justify='left' if text else 'right', no_wrap=True)
  for rows in sections:
    for row in rows:
      table.add_row(*row)
    table.add_section()
  console = Console(width=200, color_system=None, force_terminal=False)
  with console.capture() as captured:
    console.print(table)
  return '\n'.join(line.rstrip() for line in captured.get().splitlines() if line.strip())
