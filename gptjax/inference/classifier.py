"""Classification of texts with a trained model."""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float

from gptjax.config import UserError
from gptjax.data import Tokenizer
from gptjax.inference.forward import bucket, dispatch_ahead, forward, padded_batch, power_of_two, put_batch
from gptjax.model import AbstractModel, Parameters, left_padded
from gptjax.sharding import BATCH_SPEC, padded_batch_size


class Classifier:
  """Finds the probabilities of a text's classes, in batches of texts of like lengths.

    classifier = Classifier(trained.model, trained.mesh, held_out.tokenizer)
    classifier(trained.parameters, [classifier.ids('Call now to win!')])[0]

  Args:
    model, mesh: of the parameters.
    tokenizer: of the texts.
    batch_tokens: maximum tokens per batch, padding included.

  Raises:
    UserError: a model that does not classify texts.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, tokenizer: Tokenizer, batch_tokens: int = 2**13):
    if not model.config.classes:
      raise UserError('model.classes', 0, 'a run with objective.kind=classification; gptjax.generate continues texts')
    self._mesh, self._tokenizer, self._batch_tokens = mesh, tokenizer, batch_tokens
    self.longest = model.context - 1
    """tokens of a text that are read, the last ones: a row of training also has the class"""
    self._classes, self._run = model.config.classes, _probabilities(model, mesh)

  def ids(self, text: str, source: str = 'text') -> list[int]:
    """The token ids of a text. Raises a UserError for one, named `source`, that is empty or that the tokenizer cannot encode."""
    if not text.strip():
      raise UserError(source, text, 'a text to classify')
    return [*self._tokenizer.start_ids, *self._tokenizer.encode(text, source).tolist()]

  def __call__(self, parameters: Parameters, texts: Sequence[Sequence[int]]) -> Float[np.ndarray, 'N C']:
    """The probability of each class for each text, given by its `ids`, in their order."""
    read = [text[-self.longest:] for text in texts]
    order = sorted(range(len(read)), key=lambda index: (-bucket(len(read[index])), index))

    def results():
      for length, group in itertools.groupby(order, key=lambda index: bucket(len(read[index]))):
        indices = list(group)
        rows = padded_batch_size(self._mesh, min(max(self._batch_tokens // length, 1), power_of_two(len(indices))))
        for start in range(0, len(indices), rows):
          some = indices[start:start + rows]
          yield some, self._run(parameters, put_batch(self._mesh, padded_batch([read[index] for index in some], rows, length)))

    found = np.empty((len(texts), self._classes), np.float32)
    for indices, probabilities in dispatch_ahead(results()):
      found[indices] = np.asarray(probabilities)[:len(indices)]
    return found


@functools.lru_cache(maxsize=16)
def _probabilities(model: AbstractModel, mesh: Mesh) -> Callable:
  """Jitted (parameters, batch) -> probabilities of the classes [B, C], from the last token of each row."""
  def local(module, batch):
    rows, length = batch['tokens'].shape
    hidden = module.hidden(batch['tokens'], left_padded(length, batch['padding']))[0].reshape(rows, length, -1)
    return jax.nn.softmax(module.head.logits(hidden[:, -1]))

  run = forward(model, mesh, 0, local, (BATCH_SPEC,), BATCH_SPEC)
  return jax.jit(lambda parameters, batch: jax.reshard(run(parameters, batch), PartitionSpec(None, None)))
