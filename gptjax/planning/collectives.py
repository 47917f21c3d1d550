"""The collectives of a compiled program, read from its text.

XLA for TPUs writes a collective in these forms, all of which are counted:

- plain and asynchronous instructions: `all-gather(`, `all-gather-start(` (its `-done` moves nothing more);
- a reduce-scatter as a fusion that calls `%all-reduce-scatter.N`, a computation of an all-reduce and a slice of it;
- one collective in the background of matrix products: a chain of fusions (`%async_collective_fusion.N` and others), each of which
  repeats the instruction with the same channel and the same `chain_id`;
- `call-start(` of a computation that contains it, which the sparse cores of a TPU7x run concurrently;
- an all-reduce in place of a reduce-scatter among all devices of a slice;
- an all-reduce of shards padded with zeros in place of an all-gather, among all of v5p:4x4x4, or where shards do not fill complete tiles.

Devices of a collective are written as lists, as `[4,16]<=[16,4]T(1,0)`, or as axes of a mesh that the program defines.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

import numpy as np

_SHAPE = re.compile(r'(pred|[a-z]+?(\d+)[a-z0-9]*)\[([\d,]*)\]')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$')
_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)(-start)?\(')
_CALLED = re.compile(
  r'(?:calls|true_computation|false_computation|branch_computations| call(?:-start)?\(.*to_apply)=\{?((?:%[\w.-]+[, ]*)+)')
_OPERATIONS = 4
"""Branches of the condition on the operation of a tick: none, F, B, W."""
PADDED = 'all-gather of shards padded with zeros'
"""Purpose of an all-reduce that adds up shards, each in its place among zeros; it sends twice the bytes of an all-gather."""


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation, of the compiled program or of the analytic model."""

  kind: str
  """all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute"""
  dtype: str
  """XLA's name: f32, bf16"""
  payload: float
  """bytes of the full array, before a reduce-scatter or after an all-gather; of a permute: bytes that a device sends; of a
  compiled ragged all-to-all: the room for its result, of which only the rows that come are sent"""
  group: int
  """devices that take part together"""
  axes: tuple[str, ...]
  """mesh axes along which the devices of a group differ"""
  trips: float = 1
  """times per step, including the loops around it"""
  why: str = ''
  """its purpose"""

  @property
  def bytes(self) -> float:
    """Bytes that each device sends each time, by a ring: payload * (n - 1) / n, twice that for an all-reduce."""
    if self.kind == 'collective-permute':
      return self.payload
    passes = 2 if self.kind == 'all-reduce' else 1  # an all-reduce is a reduce-scatter and an all-gather
    return passes * self.payload * (self.group - 1) / self.group

  @property
  def total(self) -> float:
    """Bytes that each device sends per step."""
    return self.bytes * self.trips


def totals(found: Iterable[Collective], key: Callable[[Collective], Hashable] = lambda one: (one.axes, one.kind, one.dtype)) -> dict:
  """Bytes that a device sends per step, by a key of the collectives."""
  sums: dict[Hashable, float] = collections.defaultdict(float)
  for one in found:
    sums[key(one)] += one.total
  return dict(sums)


def collectives(text: str, mesh: Mapping[str, int], operation: float = 1.0) -> list[Collective]:
  """The collectives of a compiled program.

  Args:
    text: `compiled.as_text()`, of one partition.
    mesh: sizes of the axes, as `mesh.shape`; the program numbers devices in the mesh's order.
    operation: share of the ticks of a pipeline at which a stage runs F, and as often B and W. Of other conditions, the branch that sends
      counts: the stage with the most work takes it.

  Raises:
    ValueError: a loop around collectives whose trip count is not in the text.
  """
  computations, entry = _computations(text)
  seen: set[tuple[str, str]] = set()
  found = []
  for name, line, trips in _executed(computations, entry, operation):
    if match := _COLLECTIVE.search(line):
      link = _attribute(line, 'channel_id'), _attribute(line, 'chain_id')
      if not link[1] or link not in seen:
        seen.add(link)
        if math.isnan(trips):
          raise ValueError(f'no trip count for a loop around a collective: {line.strip()[:200]}')
        found += [dataclasses.replace(one, trips=trips) for one in _parse(line, match, name, computations, mesh)]
  return found


def executed(text: str, operation: float = 1.0) -> Iterator[tuple[str, float]]:
  """The instructions of a compiled program, and how often each is executed per step; NaN where the text does not tell. `operation`: as in
  `collectives`."""
  for _, line, trips in _executed(*_computations(text), operation):
    yield line, trips


def _executed(computations: dict[str, list[str]], name: str, operation: float, trips: float = 1) -> Iterator[tuple[str, str, float]]:
  for line in computations.get(name, ()):
    yield name, line, trips
    if ' while(' in line:
      yield from _executed(computations, _attribute(line, 'body'), operation, trips * _trip_count(line, computations))
    elif not re.search(r' [\w-]+-(done|update)\(', line):  # these name the computation that their -start has called
      for called in _CALLED.findall(line):
        branches = re.findall(r'%([\w.-]+)', called)
        share = operation if ' conditional(' in line and len(branches) == _OPERATIONS else 1
        for branch in branches:
          yield from _executed(computations, branch, operation, trips * share)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation, and the name of the entry."""
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
    raise ValueError('the text is not an HLO program: it has no ENTRY computation')
  return found, entry


def _attribute(line: str, name: str) -> str:
  match = re.search(rf'\b{name}="?%?([\w.-]+)', line)
  return match[1] if match else ''


def _trip_count(line: str, computations: dict[str, list[str]]) -> float:
  """Trips of a while loop: XLA's own count if the line has one, else the bound of a scan's counter, which starts at 0; or NaN."""
  if match := re.search(r'known_trip_count\W+n\W+(\d+)', line):
    return int(match[1])
  condition = computations[_attribute(line, 'condition')]
  bounds = {int(n) for one in condition for n in re.findall(r'= [su]32\[\]\S* constant\((\d+)\)', one)}
  return bounds.pop() if len(bounds) == 1 else math.nan


def _parse(line: str, match: re.Match, name: str, computations: dict[str, list[str]], mesh: Mapping[str, int]) -> Iterator[Collective]:
  """The collectives of one instruction, which may combine arrays of several dtypes."""
  kind, asynchronous = match[2], bool(match[3])
  groups = _groups(line, math.prod(mesh.values()))
  size = groups.shape[1]
  if size == 1 and kind != 'collective-permute':
    return
  places = np.unravel_index(groups, tuple(mesh.values()))
  axes = tuple(axis for axis, place in zip(mesh, places) if np.ptp(place, axis=1).any())
  shapes = [(one[1], math.prod(_numbers(one[3])) * (1 if one[1] == 'pred' else int(one[2]) / 8)) for one in _SHAPE.finditer(match[1])]
  if asynchronous and kind in ('all-gather', 'collective-permute'):
    shapes = [one for one in shapes if one[0] != 'u32' or kind == 'all-gather']  # a permute carries two semaphores
    shapes = shapes[len(shapes) // 2:]  # operands, then results
  why = [''] * len(shapes)
  if kind == 'all-reduce' and name.startswith('all-reduce-scatter'):
    kind = 'reduce-scatter'  # its operand is the full array
  elif kind == 'reduce-scatter':
    shapes = [(dtype, count * size) for dtype, count in shapes]
  elif kind == 'all-reduce' and not asynchronous:  # several may share one instruction
    operands = re.findall(r'%[\w.-]+', line[line.index('all-reduce('):].partition(')')[0])
    why = [PADDED if _is_padded(operand, computations[name], computations) else '' for operand in operands]
    assert len(why) == len(shapes), line
  sums: dict[tuple[str, str], float] = collections.defaultdict(float)
  for (dtype, count), reason in zip(shapes, why):
    sums[dtype, reason] += count
  for (dtype, reason), payload in sums.items():
    yield Collective(kind, dtype, payload, size, axes, why=reason)


def _is_padded(operand: str, here: list[str], computations: dict[str, list[str]]) -> bool:
  """Whether an operand is a device's shard written into an array of zeros."""
  defined = next((one for one in here if one.lstrip().removeprefix('ROOT ').startswith(f'{operand} = ')), '')
  root = next((one for one in computations.get(_attribute(defined, 'calls'), ()) if one.lstrip().startswith('ROOT')), '')
  fused = ' fusion(%broadcast' in defined and ' dynamic-update-slice(' in root
  return fused or ' dynamic-update-slice(%broadcast' in defined


def _groups(line: str, devices: int) -> np.ndarray:
  """The groups of devices [groups, size]; of a permute, its pairs."""
  if match := re.search(r'(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}', line):
    return np.array([_numbers(one) for one in match[1].split('},{')])
  if match := re.search(r'replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', line):
    return _iota(match[2]).reshape(_numbers(match[1]))
  if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{([^}]*)\}", line):
    return _along_axes(*match.groups())
  return np.arange(devices)[None]


def _numbers(text: str) -> list[int]:
  return list(map(int, re.findall(r'\d+', text)))


def _iota(text: str) -> np.ndarray:
  """'[16,4]T(1,0)': 0, 1, 2, ... in this shape, transposed."""
  shape, _, order = text.partition('T')
  ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return ids.transpose(_numbers(order)) if order else ids


def _along_axes(mesh: str, order: str | None, axes: str) -> np.ndarray:
  """"mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": groups along axes, or parts 'a':(2)2 of axes, of a mesh."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = np.arange(math.prod(sizes.values()))
  if order:
    ids = _iota(order) if order.startswith('[') else np.array(_numbers(order))
  parts = {name: (int(before or 1), int(part or sizes[name])) for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
  split = [(before, part, size // before // part) for name, size in sizes.items() for before, part in [parts.get(name, (1, 1))]]
  ids = np.moveaxis(ids.reshape(np.ravel(split)), range(1, 3 * len(split), 3), range(-len(split), 0))
  return ids.reshape(-1, math.prod(part for _, part, _ in split))
