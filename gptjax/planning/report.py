"""A plan in words and tables, and as JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from gptjax.planning.collectives import PADDED, totals
from gptjax.planning.estimate import Estimate
from gptjax.planning.roofline import DAY
from gptjax.planning.search import settings
from gptjax.planning.volumes import by_axis
from gptjax.sharding import abstract_mesh
from gptjax.sharding import describe as describe_mesh
from gptjax.sharding.chips import GIB

SHOWN = 1e-3
"""Rows of bytes moved below this share of the largest are left out of the table; the JSON has them."""


def describe(one: Estimate) -> str:
  """Everything that a person asks of a plan."""
  return '\n'.join([_head(one), '', _memory(one), '', _volumes(one), '', _bounds(one), '', _verdict(one)])


def _head(one: Estimate) -> str:
  config, sizes = one.config, one.sizes
  mesh = describe_mesh(abstract_mesh(sizes))
  model = f'{one.parameters / 1e9:.2f}B parameters, {config.compute.dtype}'
  batch = f'{config.batch_size} x {config.data.context} tokens a step'
  if config.microbatches > 1:
    batch += f' in {config.microbatches} microbatches'
  return (f'{one.topology.name}: {one.topology.devices} devices, mesh {mesh}, ZeRO stage {config.zero_stage}, remat '
          f'{config.compute.remat}\n{model}, {batch}, {one.steps:,} steps, {one.tokens:.4g} tokens')


def _memory(one: Estimate) -> str:
  table = _table('bytes a device', 'theory GiB', 'compiled GiB')
  compiled, gib = one.compiled, lambda count: f'{count / GIB:.2f}'
  for field in dataclasses.fields(one.memory):
    table.add_row(field.name, gib(getattr(one.memory, field.name)), '')
  if compiled:
    table.add_section()
    for name, theory, count in (
        ('state and batch (arguments)', one.memory.state, compiled.arguments),
        ('temporaries and results', one.memory.total - one.memory.state, compiled.temporaries + compiled.outputs),
        ('code', 0, compiled.code)):
      table.add_row(name, gib(theory), gib(count))
  table.add_section()
  table.add_row('in all', gib(one.memory.total), gib(compiled.total) if compiled else '')
  chip = one.topology.chip
  table.add_row('of the memory', _percent(one.memory.total / chip.memory), _percent(compiled.total / chip.memory) if compiled else '')
  return _text(table)


def _volumes(one: Estimate) -> str:
  table = _table('sent by a device, a step', 'axes', 'dtype', 'theory GB', 'compiled GB')
  theory, found = totals(one.theory), totals(one.found)
  largest = max([*theory.values(), *found.values()], default=0.0)
  gigabytes = lambda sums, key: f'{sums[key] / 1e9:.3f}' if key in sums else ''
  for key in sorted({*theory, *found}, key=lambda key: (key[0], -max(theory.get(key, 0.0), found.get(key, 0.0)))):
    if max(theory.get(key, 0.0), found.get(key, 0.0)) >= SHOWN * largest:
      table.add_row(key[1], ', '.join(key[0]), key[2], gigabytes(theory, key), gigabytes(found, key))
  table.add_section()
  ours, theirs = by_axis(one.theory), by_axis(one.found)
  for axis in sorted({*ours, *theirs}):
    table.add_row('in all', axis, '', gigabytes(ours, axis), gigabytes(theirs, axis))
  if not largest:
    return 'Nothing is sent between devices.'
  padded = sum(collective.total for collective in one.found if collective.why == PADDED)
  note = f'\nOf the all-reduces {padded / 1e9:.1f} GB gather shards that do not fill tiles: twice what an all-gather sends.'
  return _text(table) + (note if padded > 0.05 * sum(theirs.values()) else '')


def _bounds(one: Estimate) -> str:
  bounds = one.bounds
  table = _table('at best, a step', 'ms', 'MFU')
  for name, seconds in bounds.seconds.items():
    table.add_row(name, f'{seconds * 1e3:.1f}', '')
  table.add_section()
  for name, seconds in (('all at once (max)', bounds.overlapped), ('one after another (sum)', bounds.sequential)):
    table.add_row(name, f'{seconds * 1e3:.1f}', _percent(bounds.mfu(seconds)))
  return _text(table)


def _verdict(one: Estimate) -> str:
  bounds, topology = one.bounds, one.topology
  source = 'compiled' if one.compiled else 'by theory'
  if one.refusal:
    fits = f'does not fit: {one.refusal}'
  else:
    word = 'fits' if one.fits else 'does not fit'
    fits = f'{word}, {source}: {one.needed / GIB:.1f} of the {one.available / GIB:.1f} GiB that a program may take'
  per_day = one.tokens / one.steps / bounds.overlapped * DAY
  days = one.days(bounds.overlapped)
  chips = f'{topology.chips} chip{"s" if topology.chips > 1 else ""}, {days * 24 * topology.chips:,.0f} chip-hours'
  return (f'{fits}\n{bounds.flops:.4g} FLOPs a step on each device ({bounds.executed:.4g} with what is computed again); '
          f'{bounds.binds} binds\nat best {per_day:.3g} tokens a day: {one.tokens:.4g} tokens take {days:.1f} days on {chips} '
          f'({one.days(bounds.sequential):.1f} days if nothing overlaps)')


def ranking(ranked: Sequence[Estimate], count: int = 10) -> str:
  """The best candidates of a search, one a row."""
  names = [name for name in settings(ranked[0]) if not name.startswith('mesh.') or any(settings(one)[name] != 1 for one in ranked)]
  table = _table('', *names, 'GiB', 'ms at best', 'ms in sequence', 'MFU at best', 'binds')
  for place, one in enumerate(ranked[:count], 1):
    bounds = one.bounds
    table.add_row(str(place), *(str(settings(one)[name]) for name in names), f'{one.needed / GIB:.1f}{"" if one.fits else " !"}',
                  f'{bounds.overlapped * 1e3:.0f}', f'{bounds.sequential * 1e3:.0f}', _percent(bounds.mfu(bounds.overlapped)),
                  bounds.binds)
  fitting = sum(one.fits for one in ranked)
  return f'{len(ranked)} layouts, {fitting} that fit{"" if fitting else "; ! does not fit"}\n' + _text(table)


def as_json(one: Estimate) -> dict[str, Any]:
  """All of a plan as plain data; bytes, seconds and FLOPs are per device and step."""
  bounds = one.bounds
  program = one.compiled and {
    name: getattr(one.compiled, name) for name in ('arguments', 'temporaries', 'outputs', 'code', 'total', 'seconds')}
  rows = lambda found: [dataclasses.asdict(collective) | {'total': collective.total} for collective in found]
  return {
    'topology': one.topology.name, 'devices': one.topology.devices, 'chips': one.topology.chips, 'settings': settings(one),
    'parameters': one.parameters, 'steps': one.steps, 'tokens': one.tokens, 'fits': one.fits, 'refusal': one.refusal,
    'available': one.available, 'memory': dataclasses.asdict(one.memory) | {'total': one.memory.total}, 'compiled': program,
    'collectives': {'theory': rows(one.theory), 'compiled': rows(one.found)},
    'flops': bounds.flops, 'executed_flops': bounds.executed, 'seconds': bounds.seconds, 'binds': bounds.binds,
    'bounds': {name: {'seconds': seconds, 'mfu': bounds.mfu(seconds), 'days': one.days(seconds),
                      'chip_hours': one.days(seconds) * 24 * one.topology.chips}
               for name, seconds in (('overlapped', bounds.overlapped), ('sequential', bounds.sequential))},
  }


def _table(*columns: str) -> Table:
  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
  texts = {'', 'axes', 'dtype', 'binds', columns[0]}
  for column in columns:
    table.add_column(column, justify='left' if column in texts else 'right', no_wrap=True)
  return table


def _text(table: Table) -> str:
  console = Console(width=200, color_system=None, force_terminal=False)
  with console.capture() as captured:
    console.print(table)
  return '\n'.join(line.rstrip() for line in captured.get().splitlines() if line.strip())


def _percent(share: float) -> str:
  return f'{share:.1%}' if math.isfinite(share) else ''
