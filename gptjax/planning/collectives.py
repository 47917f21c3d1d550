"""What a compiled program sends between devices, read from its text.

The forms in which XLA for TPUs writes a collective, all of them counted here:

- plain and asynchronous instructions: `all-gather(`, `all-gather-start(` (its `-done` moves nothing more);
- a reduce-scatter as a fusion that calls `%all-reduce-scatter.N`, a computation of an all-reduce and a slice of it;
- one collective in the background of products: a chain of fusions (`%async_collective_fusion.N` and others), each of which
  repeats the instruction with the same channel and the same `chain_id`;
- `call-start(` of a computation that holds it, which the sparse cores of a TPU7x run beside the others;
- an all-reduce of shards padded with zeros in place of an all-gather, where shards do not fill whole tiles.

Devices of a collective are written as lists, as `[4,16]<=[16,4]T(1,0)`, or as axes of a mesh of the program's own.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_BITS = re.compile(r'(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$')
_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)(-start)?\(')
_CALLED = re.compile(r'(?:calls|true_computation|false_computation)=%([\w.-]+)|branch_computations=\{([^}]*)\}')
PADDED = 'all-gather of shards padded with zeros'
"""What an all-reduce is for that adds up shards, each in its place among zeros; it sends twice what an all-gather would."""
_RING_PASSES = {'all-reduce': 2}
"""An all-reduce is a reduce-scatter and an all-gather of the same array; everything else passes it around once."""


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation, of the compiled program or of theory."""

  kind: str
  """all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute"""
  dtype: str
  """as XLA writes it: f32, bf16"""
  payload: float
  """bytes of the whole array, as it is before a reduce-scatter or after an all-gather; of a permute: what a device sends"""
  group: int
  """devices that take part together"""
  axes: tuple[str, ...]
  """mesh axes that the devices of a group differ in"""
  trips: int = 1
  """times a step, with the loops around it counted"""
  why: str = ''
  """what it is for"""

  @property
  def bytes(self) -> float:
    """Bytes that each device sends at each time, by a ring: payload * (n - 1) / n, twice that for an all-reduce."""
    if self.kind == 'collective-permute':
      return self.payload
    return _RING_PASSES.get(self.kind, 1) * self.payload * (self.group - 1) / self.group

  @property
  def total(self) -> float:
    """Bytes that each device sends in a step."""
    return self.bytes * self.trips


def totals(found: Sequence[Collective]) -> dict[tuple[tuple[str, ...], str, str], float]:
  """Bytes a device sends in a step, by (axes, kind, dtype); the largest first."""
  sums: dict[tuple[tuple[str, ...], str, str], float] = {}
  for one in found:
    key = (one.axes, one.kind, one.dtype)
    sums[key] = sums.get(key, 0) + one.total
  return dict(sorted(sums.items(), key=lambda item: -item[1]))


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
  """The collectives of a compiled program.

  Args:
    text: `compiled.as_text()`, of one partition.
    mesh: sizes of the axes, as `mesh.shape`; the program numbers devices in the mesh's order.

  Raises:
    ValueError: a loop around collectives whose count of trips the text does not give.
  """
  computations, entry = _computations(text)
  holders = _holders(computations)
  seen: set[tuple[str, str]] = set()

  def walk(name: str, trips: int) -> Iterator[Collective]:
    lines = computations[name]
    for line in lines:
      if match := _COLLECTIVE.search(line):
        if chain := _attribute(line, 'chain_id'):
          link = (_attribute(line, 'channel_id'), chain)
          if link in seen:
            continue
          seen.add(link)
        yield from _parse(line, match, name, computations, mesh, trips)
      elif ' while(' in line and (body := _attribute(line, 'body')) in holders:
        yield from walk(body, trips * _trip_count(line, computations))
      elif not re.search(r' [\w-]+-(done|update)\(', line):  # they name what their -start has called
        for one, several in _CALLED.findall(line):
          for called in [one] if one else re.findall(r'%([\w.-]+)', several):
            if called in holders:
              yield from walk(called, trips)
        if re.search(r' call(-start)?\(', line) and (called := _attribute(line, 'to_apply')) in holders:
          yield from walk(called, trips)

  return list(walk(entry, 1))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  found: dict[str, list[str]] = {}
  name = entry = ''
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      name = match[2]
      found[name] = []
      entry = name if match[1] else entry
    elif name and line.startswith('  '):
      found[name].append(line)
  if not entry:
    raise ValueError('the text is no HLO program: it has no ENTRY computation')
  return found, entry


def _holders(computations: dict[str, list[str]]) -> set[str]:
  """Computations that hold a collective, or call one that does: all others need no visit."""
  callers: dict[str, set[str]] = {}
  todo = []
  for name, lines in computations.items():
    for line in lines:
      if _COLLECTIVE.search(line):
        todo.append(name)
      for called in re.findall(r'(?:calls|body|to_apply|true_computation|false_computation)=%([\w.-]+)', line):
        callers.setdefault(called, set()).add(name)
      for several in re.findall(r'branch_computations=\{([^}]*)\}', line):
        for called in re.findall(r'%([\w.-]+)', several):
          callers.setdefault(called, set()).add(name)
  found: set[str] = set()
  while todo:
    name = todo.pop()
    if name not in found:
      found.add(name)
      todo += callers.get(name, ())
  return found


def _attribute(line: str, name: str) -> str:
  match = re.search(rf'\b{name}="?%?([\w.-]+)', line)
  return match[1] if match else ''


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
  """Trips of a while: XLA's own count where it gives one, else the bound that a scan's counter, from 0, is compared with."""
  if match := re.search(r'known_trip_count\W+n\W+(\d+)', line):
    return int(match[1])
  condition = computations[_attribute(line, 'condition')]
  bounds = {int(n) for one in condition for n in re.findall(r'= [su]32\[\]\S* constant\((\d+)\)', one)}
  if len(bounds) != 1:
    raise ValueError(f'no count of trips for a loop around collectives: {line.strip()[:200]}')
  return bounds.pop()


def _parse(line: str, match: re.Match, name: str, computations: dict[str, list[str]], mesh: Mapping[str, int],
           trips: int) -> Iterator[Collective]:
  kind, asynchronous = match[2], bool(match[3])
  group = _group(line, math.prod(mesh.values()))
  axes = _axes(group, mesh)
  size = len(group[0])
  shapes = [(m[1], math.prod(map(int, filter(None, m[3].split(',')))) * _item_bytes(m)) for m in _BITS.finditer(match[1])]
  if asynchronous and kind in ('all-gather', 'collective-permute'):
    shapes = [one for one in shapes if one[0] != 'u32' or kind == 'all-gather']  # a permute carries two semaphores
    shapes = shapes[len(shapes) // 2:]  # operands, then results
  if size == 1 and kind != 'collective-permute':
    return
  why = [''] * len(shapes)
  if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):
    kind = 'reduce-scatter'  # of the array as it comes in, whole
  elif kind == 'reduce-scatter':
    shapes = [(dtype, count * size) for dtype, count in shapes]
  elif kind == 'all-reduce' and not asynchronous:  # several may share one instruction
    why = [PADDED if _is_padded(operand, computations[name], computations) else '' for operand in _operands(line)]
    assert len(why) == len(shapes), line
  sums: dict[tuple[str, str], float] = {}
  for (dtype, count), reason in zip(shapes, why):
    sums[dtype, reason] = sums.get((dtype, reason), 0) + count
  for (dtype, reason), payload in sums.items():
    yield Collective(kind, dtype, payload, size, axes, trips, reason)


def _item_bytes(shape: re.Match) -> float:
  return 1 if shape[1] == 'pred' else int(shape[2]) / 8


def _operands(line: str) -> list[str]:
  return re.findall(r'%[\w.-]+', line[line.index('all-reduce('):].partition(')')[0])


def _is_padded(operand: str, here: list[str], computations: dict[str, list[str]]) -> bool:
  """Whether an operand is a device's shard written into an array of zeros."""
  defined = next((one for one in here if one.lstrip().removeprefix('ROOT ').startswith(f'{operand} = ')), '')
  root = next((one for one in computations.get(_attribute(defined, 'calls'), ()) if one.lstrip().startswith('ROOT')), '')
  fused = ' fusion(%broadcast' in defined and ' dynamic-update-slice(' in root
  return fused or ' dynamic-update-slice(%broadcast' in defined


def _group(line: str, devices: int) -> list[list[int]]:
  """The groups of devices; of a permute, its pairs."""
  if match := re.search(r'source_target_pairs=\{(\{.*?\})\}', line):
    return _lists(match[1])
  if match := re.search(r'replica_groups=\{(\{.*?\})\}', line):
    return _lists(match[1])
  if match := re.search(r'replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)', line):
    return _iota(match[1]).tolist()
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{([^}]*)\}", line):
    return _named(*match.groups())
  return [list(range(devices))]


def _lists(text: str) -> list[list[int]]:
  return [list(map(int, one.split(','))) for one in re.findall(r'\{([\d,]+)\}', text)]


def _iota(text: str) -> np.ndarray:
  """'[4,16]<=[16,4]T(1,0)': 0, 1, 2, ... in the second shape, transposed, in the first shape."""
  shape, source, order = (tuple(map(int, part.split(','))) if part else ()
                          for part in re.fullmatch(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups())  # type: ignore[union-attr]
  ids = np.arange(math.prod(source)).reshape(source)
  return (ids.transpose(order) if order else ids).reshape(shape)


def _named(mesh: str, order: str | None, axes: str) -> list[list[int]]:
  """"mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": groups along axes, or parts 'a':(2)2 of axes, of a mesh."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = np.arange(math.prod(sizes.values()))
  if order and (match := re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', order)):
    source = tuple(map(int, match[1].split(',')))
    ids = ids.reshape(source).transpose(tuple(map(int, match[2].split(','))) if match[2] else None).reshape(-1)
  elif order:
    ids = np.array(list(map(int, re.findall(r'\d+', order))))
  wanted: dict[str, tuple[int, int]] = {}
  shape: list[int] = []
  grouped: list[int] = []
  for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
    wanted[name] = (int(before), int(part)) if part else (1, sizes[name])
  for name, size in sizes.items():
    before, part = wanted.get(name, (1, 1))
    grouped.append(len(shape) + 1)
    shape += [before, part, size // before // part]
  ids = np.moveaxis(ids.reshape(shape), grouped, range(-len(grouped), 0))
  return ids.reshape(-1, math.prod(part for _, part in wanted.values())).tolist()


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
  """Mesh axes whose coordinate differs within a group."""
  places = [np.stack(np.unravel_index(group, tuple(mesh.values()))) for group in groups]
  return tuple(name for axis, name in enumerate(mesh) if any(np.ptp(place[axis]) for place in places))
