"""Forward passes without gradients: on each device's own rows, for rows of unequal lengths, with results read one batch late."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gptjax.model import AbstractModel
from gptjax.sharding import BATCH_SPEC, batch_shard_map

T = TypeVar('T')


def forward(model: AbstractModel, mesh: Mesh, zero_stage: int, function: Callable, in_specs: tuple, out_specs: Any) -> Callable:
  """A function (parameters, *inputs) -> function(module, *inputs) that runs on each device's own rows; the parameters are stored as at
  `zero_stage`, and the specs state how rows of inputs and results are divided."""
  zero = model.zero(zero_stage, mesh)
  local = lambda entered, *inputs: function(model.merge(zero.weights(entered, differentiated=False)), *inputs)
  run = batch_shard_map(local, (zero.in_specs, *in_specs), out_specs)
  return lambda parameters, *inputs: run(zero.enter(parameters), *inputs)


def padded_batch(rows: Sequence[Sequence[int]], batch: int, length: int) -> dict[str, np.ndarray]:
  """Rows of ids as `tokens` [batch, length], padded at the beginning, and their `padding` [batch]; rows that are added have one token."""
  tokens, padding = np.zeros((batch, length), np.int32), np.full(batch, length - 1, np.int32)
  for index, row in enumerate(rows):
    padding[index] = length - len(row)
    tokens[index, padding[index]:] = row
  return {'tokens': tokens, 'padding': padding}


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Puts arrays, which every process has in full, on the mesh with their rows divided."""
  sharding = NamedSharding(mesh, BATCH_SPEC)
  return {name: jax.make_array_from_callback(values.shape, sharding, lambda index: values[index]) for name, values in batch.items()}


def dispatch_ahead(results: Iterable[T]) -> Iterator[T]:
  """Yields each result when the computation of the next one has been dispatched, so that devices need not wait for the reader."""
  return (one for one, _ in itertools.pairwise(itertools.chain(results, [None])))  # type: ignore[misc]


def power_of_two(n: int) -> int:
  """The smallest power of two that is at least n."""
  return 1 << (n - 1).bit_length()


def bucket(n: int) -> int:
  """The smallest of 16, 24, 32, 48, 64, 96, ... that is at least n: lengths that programs are compiled for."""
  power = max(power_of_two(n), 16)
  return power * 3 // 4 if 16 < power and n <= power * 3 // 4 else power
