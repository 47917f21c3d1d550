"""Naive Bayes over counts of words: what a classifier of texts should be better than."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from gptjax.config import UserError
from gptjax.data.store import TokenStore
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import read_json

FILE = 'words.json'
_WORD = re.compile(r'\w+')
_GROUP = 65_536  # texts in memory at a time


@dataclasses.dataclass(frozen=True)
class NaiveBayes:
  """Multinomial naive Bayes with Laplace smoothing of 1 (Manning et al. 2008, Introduction to Information Retrieval, section 13.2); words
  are lower-cased runs of letters, digits and _. Unknown words count nothing."""

  texts: list[int]
  """[C], texts of each class"""
  words: dict[str, list[int]]
  """[C], occurrences of each word in each class"""

  @staticmethod
  def fit(texts: Iterable[tuple[str, int]], classes: int) -> 'NaiveBayes':
    """Counts texts, each with the number of its class, and their words."""
    found = NaiveBayes([0] * classes, {})
    for text, label in texts:
      found.texts[label] += 1
      for word in _WORD.findall(text.lower()):
        found.words.setdefault(word, [0] * classes)[label] += 1
    return found

  @property
  def majority(self) -> int:
    """The class of most texts, of equal ones the first."""
    return int(np.argmax(self.texts))

  @functools.cached_property
  def _scores(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Log-probabilities of the classes, and of each word in them."""
    counts = np.array([*self.words.values()]).reshape(-1, len(self.texts)) + 1
    with np.errstate(divide='ignore'):  # of a class without texts it is -inf
      return np.log(self.texts) - np.log(sum(self.texts)), dict(zip(self.words, np.log(counts) - np.log(counts.sum(0))))

  def predict(self, texts: Iterable[str]) -> Int[np.ndarray, 'N']:
    """The most probable class of each text, of equal ones the first."""
    classes, words = self._scores
    known = lambda text: (words[word] for word in _WORD.findall(text.lower()) if word in words)
    return np.array([np.argmax(sum(known(text), classes)) for text in texts], int)

  def save(self, directory: Path) -> None:
    """Writes the counts to a folder."""
    (directory / FILE).write_text(json.dumps(dataclasses.asdict(self)))

  @staticmethod
  def load(directory: Path) -> 'NaiveBayes':
    """Reads what `save` wrote; raises a UserError if it is damaged."""
    match read_json(directory / FILE):
      case {'texts': list(texts), 'words': dict(words)} if all(isinstance(one, list) and len(one) == len(texts) for one in words.values()):
        return NaiveBayes(texts, words)
    raise UserError(str(directory / FILE), '', 'counts of texts and words, as they were written; restore it')


def classified_texts(store: TokenStore, tokenizer: Tokenizer, longest: int = 0) -> Iterator[tuple[str, int]]:
  """The texts of a store with the numbers of their classes; `longest`: only those of at most so many tokens; 0: all."""
  for first in range(0, store.documents, _GROUP):
    starts = store.starts(first, min(first + _GROUP, store.documents))
    for ids in np.split(store.read(starts[:1], starts[-1:] - starts[:1]), starts[1:-1] - starts[0]):
      if not longest or len(ids) <= longest:
        yield tokenizer.decode(ids[:-1].tolist()), int(ids[-1])
