"""Log-likelihoods of continuations: the probability that a model gives to one text after another."""

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


class Request(NamedTuple):
  """Token ids of a text and of its continuation."""

  context: Sequence[int]
  """at least one id"""
  continuation: Sequence[int]


class Likelihood(NamedTuple):
  """The score of a continuation."""

  nats: float
  """log-probability, summed over its tokens; 0 if it has none"""
  greedy: bool
  """whether each of its tokens is the most likely one at its position"""


class LikelihoodScorer:
  """Scores continuations in batches; one program is compiled per bucket of lengths.

  Rows are padded on the left, so that the continuations are the last tokens of all rows; logits are computed for those only. Every
  process gets all results.

  Args:
    model: of the parameters.
    mesh: of the parameters; its groups of devices score different rows.
    batch_tokens: tokens per batch including padding; shorter rows make larger batches.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, batch_tokens: int):
    self._context, self._mesh, self._batch_tokens = model.context, mesh, batch_tokens
    self._run = _last_scores(model, mesh)

  def __call__(self, parameters: Parameters, requests: Sequence[Request],
               advance: Callable[[int], None] = lambda done: None) -> list[Likelihood]:
    """The likelihood of each request's continuation, in their order.

    Requests that exceed the model's context are truncated at their beginning; continuations must fit.

    Args:
      parameters: of the model.
      requests: any number, of any lengths.
      advance: called with the number of requests that were scored since the last call.
    """
    assert all(one.context and len(one.continuation) <= self._context for one in requests)
    sizes = {index: self._size(one) for index, one in enumerate(requests) if one.continuation}
    order = sorted(sizes, key=lambda index: (sizes[index], index), reverse=True)  # the largest first: it needs the most memory
    found = [Likelihood(0.0, True)] * len(requests)
    # The next batch is dispatched before the results of the previous one are fetched.
    waiting: list[tuple[list[int], tuple[jax.Array, jax.Array]]] = []
    for (length, end), group in itertools.groupby(order, key=sizes.__getitem__):
      indices = list(group)
      rows = self._rows(length, len(indices))
      for start in range(0, len(indices), rows):
        some = indices[start:start + rows]
        waiting.append((some, self._run(parameters, self._batch([requests[index] for index in some], rows, length, end))))
        if len(waiting) > 1:
          advance(_collect(found, requests, *waiting.pop(0)))
    for one in waiting:
      advance(_collect(found, requests, *one))
    advance(len(requests) - len(sizes))
    return found

  def _size(self, one: Request) -> tuple[int, int]:
    """Length of its row, and the number of last tokens that are scored, both rounded up to a bucket."""
    read = min(len(one.context) + len(one.continuation) - 1, self._context)
    end = next(4**power for power in itertools.count(1) if 4**power >= len(one.continuation))
    return bucket(read), min(end, bucket(read))

  def _rows(self, length: int, count: int) -> int:
    groups = row_groups(self._mesh)
    rows = min(max(self._batch_tokens // length, 1), 1 << (count - 1).bit_length())
    return -(-rows // groups) * groups

  def _batch(self, requests: Sequence[Request], rows: int, length: int, end: int) -> dict[str, jax.Array]:
    tokens, targets = np.zeros((rows, length), np.int32), np.zeros((rows, end), np.int32)
    padding = np.full(rows, length - 1, np.int32)  # rows without a request have one token, whose score is ignored
    for row, (context, continuation) in enumerate(requests):
      ids = [*context, *continuation][-(self._context + 1):]
      tokens[row, length - len(ids) + 1:] = ids[:-1]
      targets[row, end - len(continuation):] = continuation
      padding[row] = length - len(ids) + 1
    mine = process_rows(self._mesh, rows)
    return put_rows(self._mesh, {'tokens': tokens[mine], 'targets': targets[mine], 'padding': padding[mine]}, rows)


@functools.lru_cache(maxsize=16)
def _last_scores(model: AbstractModel, mesh: Mesh) -> Callable:
  """Jitted (parameters, batch) -> (log-probabilities of the last N tokens of each row, whether it is the most likely), [B, N]."""
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


def _collect(found: list[Likelihood], requests: Sequence[Request], indices: list[int], scores: tuple[jax.Array, jax.Array]) -> int:
  nats, greedy = (np.asarray(score) for score in scores)
  for row, index in enumerate(indices):
    count = len(requests[index].continuation)
    found[index] = Likelihood(float(nats[row, -count:].sum(dtype=np.float64)), bool(greedy[row, -count:].all()))
  return len(indices)
