"""Bad steps, how the compiled step detects them and how the run reacts; and the check for devices that hold wrong values."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gptjax.checkpoint import by_name
from gptjax.config import AXIS_NAMES, Fault, FaultsConfig, UserError
from gptjax.distributed import broadcast
from gptjax.files import Lines, complete_lines, json_line, write_atomic

DECAY = 0.99
"""Decay of the running mean and variance per good step."""
WARMUP = 50
"""Good steps before spikes are detected."""
MAX_CONSECUTIVE = 100
"""Bad steps that are skipped; the statistics stay the same meanwhile, so later steps would be bad too. Also steps without any target from
the start of a run on."""
_FINITE = ('trained/', 'frozen/', 'optimizer/')
"""Arrays that must be finite; the running variance of the loss may overflow."""


class LossStatistics(NamedTuple):
  """Running statistics of loss and gradient norm over good steps."""

  steps: Int[Array, '']
  mean: Float[Array, '2']
  variance: Float[Array, '2']


def initial_statistics() -> LossStatistics:
  """Returns the statistics of no steps."""
  return LossStatistics(jnp.zeros((), jnp.int32), jnp.zeros(2), jnp.zeros(2))


def is_good_step(statistics: LossStatistics, loss: Float[Array, ''], grad_norm: Float[Array, ''],
                 spike: float) -> tuple[Bool[Array, ''], LossStatistics]:
  """Returns whether a step is good, and the updated statistics, which a bad step does not change; `spike` is FaultsConfig's."""
  values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
  good = jnp.all(jnp.isfinite(values))
  away = values - statistics.mean
  if spike:
    good &= (statistics.steps < WARMUP) | jnp.all(away <= spike * jnp.sqrt(statistics.variance))
  # The first steps have equal weights, as in a plain mean.
  weight = jnp.maximum(1 - DECAY, 1 / (statistics.steps + 1))
  new = LossStatistics(statistics.steps + 1, statistics.mean + weight * away, (1 - weight) * (statistics.variance + weight * away**2))
  return good, optax.tree.where(good, new, statistics)


@dataclasses.dataclass(frozen=True)
class BadStep:
  """A step whose update was not applied."""

  step: int
  rows: tuple[int, int]
  """first row of its batch, and the row after its last"""
  loss: float
  grad_norm: float
  action: str
  """FaultsConfig.bad_step at that time"""

  def __str__(self) -> str:
    finite = bool(np.isfinite([self.loss, self.grad_norm]).all())
    return (f'step {self.step} is bad: loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}'
            f'{", a spike" if finite else ""}; rows {self.rows[0]:,} to {self.rows[1] - 1:,}')


class Rollback(Exception):
  """The run must go back to its last checkpoint; the text gives the reason."""


class BadSteps:
  """The bad steps of a run, recorded in bad_steps.jsonl of its workdir, which one process `writes` and reads on behalf of all."""

  def __init__(self, config: FaultsConfig, workdir: Path, writes: bool):
    self._config, self._file, self._writes = config, workdir / 'bad_steps.jsonl', writes
    self._lines = Lines(self._file)
    self._last, self._in_a_row = 0, 0
    self.found = _read(self._file) if writes else []
    # Broadcast, since every process must skip the same rows even if its file system shows an older file.
    self._skipped = [tuple(rows) for rows in broadcast('bad steps', sorted(bad.rows for bad in self.found if bad.action == 'rollback'))]

  def next_row(self, first: int, size: int) -> int:
    """Returns the next row at or after `first` at which a batch of `size` rows overlaps no skipped batch."""
    for begin, end in self._skipped:
      if first < end and begin < first + size:
        first = end
    return first

  def rows_of(self, step: int, size: int) -> tuple[int, int]:
    """Returns the rows (first, end) of a step: those recorded for a bad step, or else those that follow without skipped batches."""
    for bad in reversed(self.found):
      if bad.step == step:
        return bad.rows
    first = (step - 1) * size
    for begin, end in self._skipped:
      if begin < first + size:
        first += end - begin
    return first, first + size

  def excluded_after(self, row: int) -> int:
    """Returns the number of skipped rows after a row."""
    return sum(end - max(begin, row) for begin, end in self._skipped if end > row)

  def resume_from(self, step: int) -> None:
    """Forgets the steps after `step`, which are repeated; rows that a rollback skipped stay skipped."""
    kept = [bad for bad in self.found if bad.step <= step or bad.action == 'rollback']
    if self._writes:
      self._lines = Lines(self._file)
      if self._file.exists():  # this also removes a line that a kill left incomplete
        write_atomic(self._file, ''.join(map(_line, kept)))
      elif kept:
        self._lines.write(''.join(map(_line, kept)))
    self.found = kept
    skipped, in_a_row = {bad.step for bad in kept if bad.action != 'rollback'}, 0
    while step - in_a_row in skipped:
      in_a_row += 1
    # A run that resumes within a series of bad steps continues to count.
    self._last, self._in_a_row = step, broadcast('bad steps in a row', in_a_row)

  def flush(self) -> None:
    """Returns when every line is on the disk; raises a UserError if they cannot be written, and stay in memory."""
    self._lines.flush()

  def add(self, step: int, rows: tuple[int, int], loss: float, grad_norm: float) -> BadStep:
    """Records a bad step, and returns it if training continues; else raises a UserError, a Rollback, or after too many in a row a Fault."""
    bad = BadStep(step, rows, loss, grad_norm, self._config.bad_step)
    self.found.append(bad)
    if self._writes:
      self._lines.write(_line(bad))
    self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
    self._last = step
    if self._in_a_row >= MAX_CONSECUTIVE:
      raise Fault(f'{bad}; it is the last of {self._in_a_row} consecutive bad steps')
    if bad.action == 'stop':
      raise UserError('loss' if not np.isfinite(loss) else 'gradient', loss if not np.isfinite(loss) else grad_norm,
                      f'a finite value without a spike; --config.faults.bad_step=skip or rollback continues after it; {bad}; its update '
                      'was not applied')
    if bad.action == 'rollback':
      self._skipped = sorted([*self._skipped, rows])
      raise Rollback(str(bad))
    return bad


def _line(bad: BadStep) -> str:
  return json_line(dataclasses.asdict(bad)) + '\n'


def _read(file: Path) -> list[BadStep]:
  found = []
  for number, line in enumerate(complete_lines(file), 1):
    try:
      match json.loads(line):
        case {'step': int(step), 'rows': [int(begin), int(end)], 'loss': float() | None as loss, 'grad_norm': float() | None as norm,
              'action': 'stop' | 'skip' | 'rollback' as action}:
          loss, norm = (float('nan') if value is None else value for value in (loss, norm))
          found.append(BadStep(step, (begin, end), loss, norm, action))
          continue
    except ValueError:
      pass
    # Ignoring the line could change which rows the run reads.
    raise UserError(f'{file}:{number}', line.strip()[:80], 'a line with step, rows, loss, grad_norm and action, as the run wrote it')
  return found


def replica_check(state: Any, mesh: Mesh) -> Callable[[Any], str]:
  """Returns a function of states like an abstract one that names devices whose shard differs from most of its replicas, or is not finite.

  It returns '' for a healthy state. No good step produces parameters or moments that are not finite, so these are a hardware fault too;
  arrays that ZeRO shards completely have no replica to compare with. The hash of a shard is a sum of its bits with odd weights modulo 2^32,
  which every change of a single value changes. The state is read once, and nothing of its size is allocated.
  """
  return _cached_check(tuple(by_name(state, lambda leaf: leaf.sharding.spec).items()), mesh)


@functools.lru_cache(maxsize=16)
def _cached_check(leaves: tuple[tuple[str, PartitionSpec], ...], mesh: Mesh) -> Callable[[Any], str]:
  """`leaves`: path and sharding of each array of the state."""
  paths, specs = zip(*leaves)
  copies = mesh.size > 1  # one device has no replicas, and hashing takes time

  def local(*parts):
    finite = [jnp.all(jnp.isfinite(part)).astype(jnp.uint32) if path.startswith(_FINITE) else jnp.uint32(1)
              for path, part in zip(paths, parts)]
    digests = jnp.stack([_digest(part) for part in parts]) if copies else jnp.zeros(len(parts), jnp.uint32)
    return jnp.stack([digests, jnp.stack(finite)])[(None,) * len(AXIS_NAMES)]

  @jax.jit
  def facts(state):
    every = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(*AXIS_NAMES, None, None), check_vma=False)
    return jax.reshard(every(*jax.tree.leaves(state)), PartitionSpec())

  def check(state: Any) -> str:
    digests, finite = np.moveaxis(np.asarray(facts(state)), -2, 0)
    differ = [(path, _deviating(digests[..., i], spec, mesh)) for i, (path, spec) in enumerate(zip(paths, specs))] if copies else []
    infinite = [(path, _named(mesh.devices[finite[..., i] == 0])) for i, path in enumerate(paths)]
    return _listed('state', infinite, 'not finite') or _listed('replicas', differ, 'differ')

  return check


def _digest(part: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(part, {4: jnp.uint32, 2: jnp.uint16, 1: jnp.uint8}[part.dtype.itemsize]).astype(jnp.uint32)
  weights = 1 + 2 * jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
  return jnp.sum(bits * weights, dtype=jnp.uint32)


def _deviating(digests: np.ndarray, spec: PartitionSpec, mesh: Mesh) -> str:
  """Returns the devices whose digest (one per device of the mesh) of an array differs from most replicas of the same shard."""
  split = {name for axes in spec if axes is not None for name in ((axes,) if isinstance(axes, str) else axes)}
  replicated = [i for i, name in enumerate(AXIS_NAMES) if name not in split]
  count = int(np.prod([mesh.devices.shape[i] for i in replicated]))
  grouped = lambda x: np.moveaxis(x, replicated, range(x.ndim - len(replicated), x.ndim)).reshape(-1, count)
  wrong = []
  for values, devices in zip(grouped(digests), grouped(mesh.devices)):
    different, counts = np.unique(values, return_counts=True)
    usual = different[counts.argmax()] if 2 * counts.max() > len(values) else None  # with two replicas either may be wrong
    wrong += [device for value, device in zip(values, devices) if value != usual]
  return _named(wrong)


def _named(devices: Iterable[Any]) -> str:
  return ', '.join(f'device {device.id} of process {device.process_index}' for device in list(devices)[:8])


def _listed(what: str, found: list[tuple[str, str]], how: str) -> str:
  wrong = [f'{path} on {devices}' for path, devices in found if devices]
  more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
  return f'{what}: {"; ".join(wrong[:3])}{more} {how}' if wrong else ''
