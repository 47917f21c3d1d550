"""Filters, which drop documents of poor quality, and decontamination, which drops those with text of an evaluation set."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated

import numpy as np

from gptjax.config.checks import Fraction, Group, Limit, UserError
from gptjax.data.sources.source import Document

_Characters = Annotated[int, Limit(lambda count: count >= 0, '0 or more characters')]


@dataclasses.dataclass(frozen=True)
class Filters(Group, prefix='--'):
  """Limits on a document's text; by default every document passes."""

  min_chars: _Characters = 0
  """minimum number of characters"""
  max_chars: _Characters = 0
  """maximum number of characters; 0: no limit"""
  min_letters: Fraction = 0.0
  """minimum fraction of letters and digits among characters other than white space"""
  max_repeated_lines: Fraction = 1.0
  """maximum fraction of characters in lines that repeat an earlier line, e.g. 0.2 (Gopher, arXiv:2112.11446 table A1)"""

  def __post_init__(self):
    super().__post_init__()
    if 0 < self.max_chars < self.min_chars:
      raise UserError('--max_chars', self.max_chars, f'0 (no limit), or at least --min_chars={self.min_chars}')

  def reason(self, text: str) -> str | None:
    """Name of the filter that drops a text, or None."""
    if len(text) < self.min_chars:
      return 'min_chars'
    if 0 < self.max_chars < len(text):
      return 'max_chars'
    if self.min_letters > 0 and len(re.sub(r'[\W_]+', '', text)) / max(len(''.join(text.split())), 1) < self.min_letters:
      return 'min_letters'
    if self.max_repeated_lines < 1:
      lines = list(map(str.strip, text.split('\n')))
      characters = sum(map(len, lines))
      if (characters - sum(map(len, set(lines)))) / max(characters, 1) > self.max_repeated_lines:
        return 'max_repeated_lines'
    return None


_NGRAM = 13  # words of the n-grams that are matched
_MIN_WORDS = 8  # words of the shortest evaluation document that is matched
_WORD = re.compile(r'[^\W_]+')
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Contamination:
  """Finds text of evaluation documents, by the name of their set, by common 13-grams of words (GPT-3, arXiv:2005.14165 appendix C).

  Words are sequences of letters and digits, in lower case; everything between them is ignored. An evaluation document of 8 to 12
  words is matched as one n-gram; a shorter one is skipped. N-grams are stored as 64-bit hashes: the probability that any of 10^6 of
  them matches 10^9 words of training text by chance is 1 in 18,000.
  """

  def __init__(self, sets: Mapping[str, Iterable[Document]]):
    self.names = list(sets)
    self.skipped = dict.fromkeys(sets, 0)
    """documents too short to be matched, by set"""
    found: dict[int, list[tuple[np.ndarray, int]]] = {}
    for owner, (name, documents) in enumerate(sets.items()):
      for document in documents:
        words = _word_hashes(document.text)
        if len(words) < _MIN_WORDS:
          self.skipped[name] += 1
        else:
          length = min(len(words), _NGRAM)
          found.setdefault(length, []).append((_ngrams(words, length), owner))
    # By length: sorted n-grams and the set of each; an n-gram of several sets belongs to the first.
    self._ngrams: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for length in sorted(found, reverse=True):
      ngrams, first = np.unique(np.concatenate([ngrams for ngrams, _ in found[length]]), return_index=True)
      owners = [np.full(len(ngrams), owner, np.uint16) for ngrams, owner in found[length]]
      self._ngrams[length] = ngrams, np.concatenate(owners)[first]

  def find(self, text: str) -> str | None:
    """Name of a set that has an n-gram in common with the text, or None."""
    words = _word_hashes(text)
    for length, (ngrams, owners) in self._ngrams.items():
      found = _ngrams(words, length)
      nearest = np.minimum(np.searchsorted(ngrams, found), len(ngrams) - 1)
      matches = np.flatnonzero(ngrams[nearest] == found)
      if len(matches):
        return self.names[owners[nearest[matches[0]]]]
    return None

  @property
  def sha256(self) -> str:
    """Hex digest of all n-grams and their sets."""
    digest = hashlib.sha256(repr(self.names).encode())
    for ngrams, owners in self._ngrams.values():
      digest.update(ngrams.tobytes() + owners.tobytes())
    return digest.hexdigest()


@functools.lru_cache(2**18)
def _word_hash(word: str) -> int:
  """A 64-bit hash that, unlike Python's own, is the same in every process."""
  return int.from_bytes(hashlib.blake2b(word.encode(errors='surrogatepass'), digest_size=8).digest())


def _word_hashes(text: str) -> np.ndarray:
  return np.fromiter(map(_word_hash, map(re.Match.group, _WORD.finditer(text.lower()))), np.uint64)


def _ngrams(words: np.ndarray, length: int) -> np.ndarray:
  """Hashes of all n-grams of a length: polynomials of the words' hashes, modulo 2^64."""
  count = max(len(words) - length + 1, 0)
  ngrams = np.zeros(count, np.uint64)
  for start in range(length):
    ngrams = ngrams * _FACTOR + words[start:start + count]
  return ngrams
