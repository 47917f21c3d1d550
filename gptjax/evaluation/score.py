"""Scores of a model over held-out documents."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.config import UserError
from gptjax.data import EvalRows
from gptjax.evaluation.classes import Confusion, class_figures, confusion_sums, counted
from gptjax.inference.forward import forward, dispatch_ahead
from gptjax.model import AbstractModel, Parameters, Positions
from gptjax.sharding import BATCH_SPEC, padded_batch_size, process_rows, put_rows, batch_psum


@dataclasses.dataclass(frozen=True)
class Score:
  """Loss over a set of documents, every target counted once."""

  loss: float
  """nats per token"""
  perplexity: float
  """exp(loss)"""
  bits_per_byte: float
  """loss of all tokens over the UTF-8 bytes of the text; compares models across tokenizers"""
  tokens: float
  """targets scored, times their weights"""
  bytes: float
  """UTF-8 bytes they stand for"""
  confusion: Confusion = ()
  """of texts to classify, whose classes are the targets"""
  figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
  """of pairs, means over them of the objective's other metrics; of prompts, those of `PassScorer`; perplexity and bits are then NaN"""
  examples: int = 0
  """number of pairs or prompts, if these are scored"""

  @property
  def logged(self) -> dict[str, float]:
    """The figures to follow over steps."""
    if self.confusion:
      figures = class_figures(self.confusion, range(len(self.confusion)))
      return {'loss': self.loss, 'accuracy': figures['accuracy'], 'macro_f1': figures['macro_f1']}
    if self.examples:
      return {'loss': self.loss, **self.figures}
    return {'loss': self.loss, 'perplexity': self.perplexity, 'bits_per_byte': self.bits_per_byte}


def score_of(nats: float, tokens: float, text_bytes: float, confusion: np.ndarray | int = 0) -> Score:
  """The score of a loss in nats, summed over tokens that stand for `text_bytes` bytes; both are above 0."""
  mean = nats / tokens
  return Score(mean, math.exp(min(mean, 700.0)), nats / math.log(2) / text_bytes, _whole(tokens), _whole(text_bytes),
               () if isinstance(confusion, int) else counted(confusion))


def _whole(number: float) -> float:
  """A whole number as an integer; weights of examples, and the bytes of a part of a text, may be fractions."""
  return int(number) if number == int(number) else number


def score_of_examples(sums: Mapping[str, float], examples: int, tokens: float, text_bytes: float) -> Score:
  """The score of sums over pairs or prompts of their figures, 'loss' among them."""
  means = {name: float(value) / examples for name, value in sums.items()}
  return Score(means.pop('loss'), math.nan, math.nan, int(tokens), _whole(text_bytes), figures=means, examples=examples)


def pooled(scores: Iterable[Score]) -> Score:
  """The score of several sets as one, in which every target counts equally."""
  scores = list(scores)
  if examples := sum(score.examples for score in scores):
    sums = {name: sum(score.logged[name] * score.examples for score in scores) for name in scores[0].logged}
    return score_of_examples(sums, examples, sum(score.tokens for score in scores), sum(score.bytes for score in scores))
  nats = sum(score.loss * score.tokens for score in scores)
  confusion = sum(np.array(score.confusion) for score in scores) if scores[0].confusion else 0
  return score_of(nats, sum(score.tokens for score in scores), sum(score.bytes for score in scores), confusion)


@dataclasses.dataclass(frozen=True)
class Scores:
  """Scores of named sets of documents."""

  sets: dict[str, Score]
  """of each set"""
  tags: dict[str, Score]
  """of each tag: its sets as one"""

  @property
  def overall(self) -> Score:
    """All sets as one."""
    return pooled(self.sets.values())

  def named(self) -> dict[str, Score]:
    """All of them by the names that metrics have: NAME, tag/TAG, and valid for all sets as one."""
    return {**self.sets, **{f'tag/{tag}': score for tag, score in self.tags.items()}, 'valid': self.overall}


class Scorer:
  """Scores rows of any number of sets in batches, with one compiled program.

  Args:
    model, mesh: of the parameters.
    objective: of training; its metric 'loss' is the score.
    batch_size: rows per batch; it is rounded up to an equal number for each group of devices, and batches are filled with padding.
    zero_stage: at which the parameters are stored.
  """

  def __init__(self, model: AbstractModel, objective: Callable, mesh: Mesh, batch_size: int, zero_stage: int = 0):
    self._mesh, self._batch_size = mesh, padded_batch_size(mesh, batch_size)
    self._sums = _summed_scores(model, objective, mesh, zero_stage)

  def sets(self, parameters: Parameters, sets: Mapping[str, EvalRows], tags: Mapping[str, Iterable[str]], *, count: int = 0,
           advance: Callable[[int], None] = lambda rows: None) -> Scores:
    """The scores of several sets, and of the sets of each tag as one; the other arguments are those of `__call__`."""
    scores = {name: self(parameters, rows, count=count, advance=advance) for name, rows in sets.items()}
    return Scores(scores, {tag: pooled(scores[name] for name in names) for tag, names in tags.items()})

  def __call__(self, parameters: Parameters, rows: EvalRows, *, count: int = 0,
               advance: Callable[[int], None] = lambda rows: None) -> Score:
    """The score of parameters on `count` of the rows, evenly spaced; 0: all. `advance` is called with the number of rows of every batch."""
    indices = rows.spaced(count)
    mine = process_rows(self._mesh, self._batch_size)

    def sums() -> Iterator[tuple[int, dict[str, jax.Array]]]:
      for start in range(0, len(indices), self._batch_size):
        chosen = indices[start:start + self._batch_size]
        # Rows beyond the last are all padding and count nothing.
        filled = np.pad(chosen, (0, self._batch_size - len(chosen)), constant_values=rows.count)
        yield len(chosen), self._sums(parameters, put_rows(self._mesh, rows.batch(filled[mine]), self._batch_size))

    totals = collections.Counter[str]()
    confusion: np.ndarray | int = 0
    for done, found in dispatch_ahead(sums()):  # more batches at once may deadlock on virtual CPU devices
      confusion = confusion + np.asarray(found.pop('confusion'), int) if 'confusion' in found else confusion
      totals.update({name: float(value) for name, value in found.items()})
      advance(done)
    tokens, pairs = totals.pop('targets'), totals.pop('terms', 0)
    if not tokens:
      raise UserError('data.valid', rows.store.location, 'rows with targets, which the answers of examples have unless their weight is 0')
    text_bytes = rows.store.target_bytes * tokens / rows.store.targets  # a part of the rows stands for the same part of the bytes
    return score_of_examples(totals, round(pairs), tokens, text_bytes) if pairs else score_of(totals['loss'], tokens, text_bytes, confusion)


@functools.lru_cache(maxsize=16)
def _summed_scores(model: AbstractModel, objective: Callable, mesh: Mesh, zero_stage: int) -> Callable:
  """The jitted function (parameters, batch) -> sums of the objective and, of a classifier, its confusion matrix."""
  def local(module, batch):
    positions = Positions(batch['positions'], batch['segments']) if 'segments' in batch else None
    hidden = module.hidden(batch['tokens'], positions)[0]
    sums = objective(module.head, hidden, batch).named
    return batch_psum(sums | ({'confusion': confusion_sums(module.head, hidden, batch)} if model.config.classes else {}))

  return jax.jit(forward(model, mesh, zero_stage, local, (BATCH_SPEC,), PartitionSpec()))
