"""Log-likelihoods of continuations: what a model thinks of a text that follows another."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.inference import bucket
from gptjax.model import AbstractModel, Parameters, left_padded
from gptjax.sharding import ROWS, local_rows, process_rows, put_rows, row_groups


class Asked(NamedTuple):
  """A text and what follows it, as ids."""

  context: Sequence[int]
  """one id or more"""
  continuation: Sequence[int]


class Likelihood(NamedTuple):
  """What a model thinks of a continuation."""

  nats: float
  """logarithm of its probability, summed over its tokens; 0 for none"""
  greedy: bool
  """whether each of its tokens is the likeliest after what is before it"""


class LikelihoodScorer:
  """Scores continuations in batches. One program is compiled for each bucket of lengths; the same requests again need no other.

  Rows are padded at their beginning: all end together, so that the continuations are the last tokens of all rows, and logits are
  made for those alone. Every process gets all results.

  Args:
    blueprint: of the model.
    mesh: where the parameters lie; its data axes share out the rows.
    batch_tokens: tokens of a batch, padding included; shorter rows make larger batches.
  """

  def __init__(self, blueprint: AbstractModel, mesh: Mesh, batch_tokens: int):
    self._plan, self._mesh, self._batch_tokens = blueprint, mesh, batch_tokens
    self._run = _last_scores(blueprint, mesh)

  @property
  def context(self) -> int:
    """Tokens that the model reads."""
    return self._plan.context

  def __call__(self, parameters: Parameters, asked: Sequence[Asked],
               advance: Callable[[int], None] = lambda done: None) -> list[Likelihood]:
    """The likelihood of each continuation, in their order.

    What does not fit the model's context is cut off at its beginning; a continuation must fit.

    Args:
      parameters: of the model.
      asked: any number, of any lengths.
      advance: told of every so many that are done.
    """
    assert all(one.context and len(one.continuation) <= self.context for one in asked)
    sizes = {index: self._size(one) for index, one in enumerate(asked) if one.continuation}
    order = sorted(sizes, key=lambda index: (sizes[index], index), reverse=True)  # the largest first: memory runs out at once or never
    found = [Likelihood(0.0, True)] * len(asked)
    # A batch is on its way while the results of the one before are looked at.
    waiting: list[tuple[list[int], tuple[jax.Array, jax.Array]]] = []
    for (length, end), group in itertools.groupby(order, key=sizes.__getitem__):
      indices = list(group)
      rows = self._rows(length, len(indices))
      for start in range(0, len(indices), rows):
        some = indices[start:start + rows]
        waiting.append((some, self._run(parameters, self._batch([asked[index] for index in some], rows, length, end))))
        if len(waiting) > 1:
          advance(_collect(found, asked, *waiting.pop(0)))
    for one in waiting:
      advance(_collect(found, asked, *one))
    advance(len(asked) - len(sizes))
    return found

  def _size(self, one: Asked) -> tuple[int, int]:
    """Tokens of a row for it, and of those at its end that are scored."""
    read = min(len(one.context) + len(one.continuation) - 1, self.context)
    end = next(4**power for power in itertools.count(1) if 4**power >= len(one.continuation))
    return bucket(read), min(end, bucket(read))

  def _rows(self, length: int, count: int) -> int:
    shared = row_groups(self._mesh)
    rows = min(max(self._batch_tokens // length, 1), 1 << (count - 1).bit_length())
    return -(-rows // shared) * shared

  def _batch(self, asked: Sequence[Asked], rows: int, length: int, end: int) -> dict[str, jax.Array]:
    tokens, targets = np.zeros((rows, length), np.int32), np.zeros((rows, end), np.int32)
    padding = np.full(rows, length - 1, np.int32)  # a row without a request has a token that nobody asks about
    for row, (context, continuation) in enumerate(asked):
      ids = [*context, *continuation][-(self.context + 1):]
      tokens[row, length - len(ids) + 1:] = ids[:-1]
      targets[row, end - len(continuation):] = continuation
      padding[row] = length - len(ids) + 1
    mine = process_rows(self._mesh, rows)
    return put_rows(self._mesh, {'tokens': tokens[mine], 'targets': targets[mine], 'padding': padding[mine]}, rows)


@functools.lru_cache(maxsize=16)
def _last_scores(model: AbstractModel, mesh: Mesh) -> Callable:
  """The jitted function (parameters, batch) -> (log-probabilities [B, N] of the last N tokens of rows, which of them are the likeliest)."""
  zero = model.zero(0, mesh)

  def local(entered, batch):
    tokens, targets, padding = batch['tokens'], batch['targets'], batch['padding']
    (rows, length), end = tokens.shape, targets.shape[1]
    module = model.merge(zero.weights(entered, differentiated=False))
    hidden = module.hidden(tokens, left_padded(length, padding))[0].reshape(rows, length, -1)
    scores = module.head.log_probabilities(hidden[:, length - end:].reshape(rows * end, -1), targets.reshape(-1))
    return tuple(score.reshape(rows, end) for score in scores)

  run = local_rows(local, (zero.in_specs, ROWS), ROWS)
  return jax.jit(lambda parameters, batch: jax.reshard(run(zero.enter(parameters), batch), PartitionSpec(None, None)))


def _collect(found: list[Likelihood], asked: Sequence[Asked], indices: list[int], scores: tuple[jax.Array, jax.Array]) -> int:
  nats, greedy = (np.asarray(score) for score in scores)
  for row, index in enumerate(indices):
    count = len(asked[index].continuation)
    found[index] = Likelihood(float(nats[row, -count:].sum(dtype=np.float64)), bool(greedy[row, -count:].all()))
  return len(indices)
