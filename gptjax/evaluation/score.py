"""Scores of a model over held-out documents."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.data import EvalRows
from gptjax.model import Blueprint, Parameters
from gptjax.sharding import place


@dataclasses.dataclass(frozen=True)
class Score:
  """Loss over a set of documents, every target counted once."""

  loss: float
  """nats per token"""
  perplexity: float
  """exp(loss)"""
  bits_per_byte: float
  """loss of all tokens over the UTF-8 bytes of the text; compares models across tokenizers"""
  tokens: int
  """targets scored"""


class Scorer:
  """Scores rows in batches with one compiled program.

  Args:
    blueprint: of the model.
    objective: (model, batch, key) -> (_, count of targets, {'loss': summed loss in nats, ...}).
    rows: the validation rows.
    mesh: where the parameters lie.
    batch_size: rows a batch; the last batch is filled up with padding.
    isolate_documents: whether attention and positions restart at each document.
  """

  def __init__(self, blueprint: Blueprint, objective: Callable, rows: EvalRows, mesh: Mesh, *, batch_size: int,
               isolate_documents: bool):
    self._rows, self._mesh, self._batch_size = rows, mesh, batch_size
    self._isolate = isolate_documents

    def sums(parameters, batch):
      _, targets, metrics = objective(blueprint.merge(parameters), batch, None)
      return metrics['loss'], targets

    self._sums = jax.jit(sums)

  def __call__(self, parameters: Parameters, *, count: int = 0, advance: Callable[[int], None] = lambda rows: None) -> Score:
    """The score of these parameters.

    Args:
      parameters: of the model.
      count: rows to score, evenly spaced; 0: all.
      advance: told of every batch's rows.
    """
    rows = self._rows.count
    indices = np.arange(rows) if not 0 < count < rows else np.arange(count) * rows // count
    loss, tokens, sums = 0.0, 0, []
    for start in range(0, len(indices), self._batch_size):
      chosen = indices[start:start + self._batch_size]
      # Rows beyond the last are all padding and count nothing.
      filled = np.concatenate([chosen, np.full(self._batch_size - len(chosen), self._rows.count)])
      batch = model_inputs(self._rows.batch(filled), self._isolate)
      sums.append(self._sums(parameters, place(self._mesh, batch, 'batch', None)))
      advance(len(chosen))
    for batch_loss, batch_tokens in jax.device_get(sums):
      loss, tokens = loss + float(batch_loss), tokens + int(batch_tokens)
    # A part of the rows stands for the same part of the bytes.
    text_bytes = self._rows.bytes * tokens / self._rows.store.targets
    mean = loss / tokens
    return Score(mean, math.exp(min(mean, 700.0)), loss / math.log(2) / text_bytes, tokens)


def model_inputs(rows: dict[str, np.ndarray], isolate_documents: bool) -> dict[str, np.ndarray]:
  """What of a row goes to the devices: positions and segments only where documents are isolated."""
  dropped = () if isolate_documents else ('positions', 'segments')
  return {name: values for name, values in rows.items() if name not in dropped}
