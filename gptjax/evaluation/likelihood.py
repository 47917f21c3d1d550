"""Log-likelihoods of continuations: the probability of one text after another."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.inference.forward import bucket, forward, dispatch_ahead, padded_batch, power_of_two, put_batch
from gptjax.model import AbstractModel, Parameters, left_padded
from gptjax.sharding import BATCH_SPEC, padded_batch_size


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
  """Scores continuations in batches; one program is compiled per bucket of lengths. Every process gets all results.

  Rows are padded on the left, so that the continuations are the last tokens of all rows; logits are computed for those only.

  Args:
    model, mesh: of the parameters.
    batch_tokens: tokens per batch including padding; shorter rows make larger batches.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, batch_tokens: int):
    self._context, self._mesh, self._batch_tokens = model.context, mesh, batch_tokens
    self._run = _last_scores(model, mesh)

  def __call__(self, parameters: Parameters, requests: Sequence[Request],
               advance: Callable[[int], None] = lambda done: None) -> list[Likelihood]:
    """The likelihood of each request's continuation, in their order.

    Requests that exceed the model's context are truncated at their beginning; continuations must fit. `advance` is called with the
    number of requests that were scored since its last call.
    """
    assert all(one.context and len(one.continuation) <= self._context for one in requests)
    sizes = {index: self._size(one) for index, one in enumerate(requests) if one.continuation}
    order = sorted(sizes, key=lambda index: (sizes[index], index), reverse=True)  # the largest first: it needs the most memory
    found = [Likelihood(0.0, True)] * len(requests)

    def scored() -> Iterator[tuple[list[int], tuple[jax.Array, jax.Array]]]:
      for (length, end), group in itertools.groupby(order, key=sizes.__getitem__):
        indices = list(group)
        rows = padded_batch_size(self._mesh, min(max(self._batch_tokens // length, 1), power_of_two(len(indices))))
        for start in range(0, len(indices), rows):
          some = indices[start:start + rows]
          yield some, self._run(parameters, self._batch([requests[index] for index in some], rows, length, end))

    for indices, scores in dispatch_ahead(scored()):
      nats, greedy = map(np.asarray, scores)
      for row, index in enumerate(indices):
        last = slice(-len(requests[index].continuation), None)
        found[index] = Likelihood(float(nats[row, last].sum(dtype=np.float64)), bool(greedy[row, last].all()))
      advance(len(indices))
    advance(len(requests) - len(sizes))
    return found

  def _size(self, one: Request) -> tuple[int, int]:
    """Length of its row, and the number of last tokens that are scored, both rounded up to a bucket."""
    read = min(len(one.context) + len(one.continuation) - 1, self._context)
    end = next(4**power for power in itertools.count(1) if 4**power >= len(one.continuation))
    return bucket(read), min(end, bucket(read))

  def _batch(self, requests: Sequence[Request], rows: int, length: int, end: int) -> dict[str, jax.Array]:
    targets = np.zeros((rows, end), np.int32)
    for row, request in enumerate(requests):
      targets[row, end - len(request.continuation):] = request.continuation
    read = [[*context, *continuation][-(self._context + 1):-1] for context, continuation in requests]
    return put_batch(self._mesh, {'targets': targets, **padded_batch(read, rows, length)})


@functools.lru_cache(maxsize=16)
def _last_scores(model: AbstractModel, mesh: Mesh) -> Callable:
  """Jitted (parameters, batch) -> (log-probabilities of the last N tokens of each row, whether it is the most likely), [B, N]."""
  def local(module, batch):
    tokens, targets = batch['tokens'], batch['targets']
    (rows, length), end = tokens.shape, targets.shape[1]
    hidden = module.hidden(tokens, left_padded(length, batch['padding']))[0].reshape(rows, length, -1)
    scores = module.head.log_probabilities(hidden[:, length - end:].reshape(rows * end, -1), targets.reshape(-1))
    return tuple(score.reshape(rows, end) for score in scores)

  run = forward(model, mesh, 0, local, (BATCH_SPEC,), BATCH_SPEC)
  return jax.jit(lambda parameters, batch: jax.reshard(run(parameters, batch), PartitionSpec(None, None)))
