"""What a sweep takes: parameters, FLOPs and time of every trial, before any is run."""

import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from gptjax.config import Config, UserError, duration_in_steps, override
from gptjax.data import load_tokenizer
from gptjax.files import expanded
from gptjax.model import flops_per_token, parameter_count
from gptjax.sharding.chips import peak_flops
from gptjax.sweeps.queue import Queue
from gptjax.sweeps.results import status_of
from gptjax.sweeps.trials import Adaptive, Sweep

_EFFICIENCY = 0.3
"""Of the speed of large matrix products, until a trial has ended and tells more."""
_IDS = {'chars': 100, 'bytes': 259}
"""Vocabularies of kinds of tokenizers that have no set size, about."""


def described(queue: Queue, workers: int) -> str:
  """A table of all trials, and the time of those that are left; of an adaptive sweep the first points."""
  sweep = queue.sweep
  trials = [*queue.trials, *queue.preview()]
  flops = [_flops(trial.config) for trial in trials]
  statuses = [status_of(queue.folder(trial)) for trial in trials]
  ended = [(found, status.seconds) for found, status in zip(flops, statuses) if status.name == 'done' and found and status.seconds]
  speed, source = _speed() if not ended else (sum(found for found, _ in ended) / sum(seconds for _, seconds in ended), 'as measured so far')
  time_of = lambda found: '?' if found is None else _duration(found / speed)
  rows = [('trial', 'status', 'parameters', 'FLOPs', 'time')]
  rows += [(trial.name, status.name, f'{_parameters(trial.config):,}', '?' if found is None else f'{found:.3g}', time_of(found))
           for trial, status, found in zip(trials, statuses, flops)]
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = ['  '.join(word.ljust(width) if index < 2 else word.rjust(width) for index, (word, width) in enumerate(zip(row, widths)))
           for row in rows]
  left = [found and found * _share(sweep, trial.config.steps) for trial, found, status in zip(trials, flops, statuses)
          if status.name not in ('done', 'failed')]
  total = '?' if None in left else _duration(sum(filter(None, left)) / speed / workers)
  more = f' of {sweep.points.count:,}; the others depend on results' if isinstance(sweep.points, Adaptive) else ''
  return '\n'.join([*lines, f'{len(trials):,} trials{more}, {len(left):,} left: about {total} with --workers={workers} at {speed:.3g} '
                    f'FLOP/s each, {source}'])


def _config(config: Config) -> Config:
  """With a vocabulary like that of the tokenizer that the run will have."""
  settings = config.data.tokenizer
  if config.model.vocab_size:
    return config
  path = expanded(settings.path) if settings.path else Path()
  size = load_tokenizer(str(path)).vocab_size if settings.path and path.exists() else _IDS.get(settings.kind, settings.vocab_size)
  return override(config, {'model.vocab_size': size})


def _parameters(config: Config) -> int:
  return parameter_count(_config(config).model, config.data.context)


def _flops(config: Config) -> float | None:
  """Of a complete run; None if its length depends on the data."""
  try:
    steps = duration_in_steps('steps', config.steps, batch_size=config.batch_size, context=config.data.context, rows_per_epoch=0)
  except UserError:
    return None
  tokens = steps * config.batch_size * config.data.context
  return tokens * flops_per_token(_config(config).model, config.data.context) if steps else None


def _share(sweep: Sweep, steps: object) -> float:
  """The share of a run's steps that successive halving takes, on average."""
  if not (halving := sweep.halving) or not isinstance(steps, int):
    return 1.0
  ends = [0, *halving.rungs, steps]
  return sum((end - start) / halving.reduction**rung for rung, (start, end) in enumerate(itertools.pairwise(ends))) / steps


def _speed() -> tuple[float, str]:
  """FLOP/s of training on this machine, and where they come from."""
  if peak := peak_flops(jax.local_devices()):
    return _EFFICIENCY * peak[0], f'{_EFFICIENCY:.0%} of the peak of {peak[1]}'
  x = jnp.ones((1024, 1024))
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  started = time.perf_counter()
  for _ in range(3):
    product(x).block_until_ready()
  return _EFFICIENCY * 3 * 2 * 1024**3 / (time.perf_counter() - started), f'{_EFFICIENCY:.0%} of what products of matrices reach here'


def _duration(seconds: float) -> str:
  for unit, size in (('days', 86400), ('hours', 3600), ('minutes', 60)):
    if seconds >= 2 * size:
      return f'{seconds / size:.1f} {unit}'
  return f'{seconds:.0f} seconds'
