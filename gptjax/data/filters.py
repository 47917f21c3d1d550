"""Which documents are left out: those of poor text, and those that hold text of an evaluation set."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping

import numpy as np

from gptjax.config import UserError
from gptjax.data.sources.source import Document


@dataclasses.dataclass(frozen=True)
class Filters:
  """Bounds on a document's text; the defaults let everything pass."""

  min_chars: int = 0
  """fewest characters"""
  max_chars: int = 0
  """most characters; 0: no limit"""
  min_letters: float = 0.0
  """least share of letters and digits among the characters that are no white space"""
  max_repeated_lines: float = 1.0
  """largest share of the characters in lines that repeat an earlier line, as 0.2 (Gopher, arXiv:2112.11446 table A1)"""

  def __post_init__(self):
    for name in ('min_chars', 'max_chars'):
      if getattr(self, name) < 0:
        raise UserError(f'--{name}', getattr(self, name), '0 or more characters')
    if 0 < self.max_chars < self.min_chars:
      raise UserError('--max_chars', self.max_chars, f'0 (no limit), or at least the {self.min_chars} of --min_chars')
    for name in ('min_letters', 'max_repeated_lines'):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(f'--{name}', getattr(self, name), '0 to 1')

  def reason(self, text: str) -> str | None:
    """Name of the filter that drops a text, or None."""
    if len(text) < self.min_chars:
      return 'min_chars'
    if 0 < self.max_chars < len(text):
      return 'max_chars'
    if self.min_letters > 0 and _letters(text) < self.min_letters:
      return 'min_letters'
    if self.max_repeated_lines < 1 and _repeated_lines(text) > self.max_repeated_lines:
      return 'max_repeated_lines'
    return None


def _letters(text: str) -> float:
  return len(re.sub(r'[\W_]+', '', text)) / max(len(''.join(text.split())), 1)


def _repeated_lines(text: str) -> float:
  """Share of characters in repeated lines; white space around lines, and blank ones, count for nothing."""
  lines = [stripped for line in text.split('\n') if (stripped := line.strip())]
  characters = sum(map(len, lines))
  return (characters - sum(map(len, set(lines)))) / max(characters, 1)


GRAM = 13
"""Words that are looked for at once."""
LEAST = 8
"""Words of the shortest evaluation document that is looked for."""

_WORD = re.compile(r'[^\W_]+')
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_KEPT_WORDS = 2**18


class _HashOfWords(dict[str, int]):
  """64-bit hashes of words, the same in every process (as Python's own are not), kept for the words seen last."""

  def __missing__(self, word: str) -> int:
    if len(self) >= _KEPT_WORDS:
      self.clear()
    value = self[word] = int.from_bytes(hashlib.blake2b(word.encode(errors='surrogatepass'), digest_size=8).digest())
    return value

  def __reduce__(self):
    return _HashOfWords, ()


class Contamination:
  """Finds evaluation text in training text by common runs of 13 words (GPT-3, arXiv:2005.14165 appendix C).

  Words are runs of letters and digits, in lower case; what stands between them does not matter. An evaluation document
  of 8 to 12 words is looked for as a whole, one of fewer not at all. A run is kept as a hash of 64 bits: among 10^9
  words of training text, 10^6 runs looked for turn up by mere chance once in 18,000 times.

  Args:
    sets: evaluation documents by the name of their set; each is read once.
  """

  skipped: dict[str, int]
  """documents too short to be looked for, by set"""
  names: list[str]
  """of the sets"""

  def __init__(self, sets: Mapping[str, Iterable[Document]]):
    self.skipped = dict.fromkeys(sets, 0)
    self.names = list(sets)
    self._hashes = _HashOfWords()
    found: dict[int, list[tuple[np.ndarray, int]]] = {}
    for owner, (name, documents) in enumerate(sets.items()):
      for document in documents:
        words = self._words(document.text)
        if len(words) < LEAST:
          self.skipped[name] += 1
        else:
          length = min(len(words), GRAM)
          found.setdefault(length, []).append((_grams(words, length), owner))
    # By length: runs in order, and the set of each; a run of two sets counts for the first.
    self._runs = {length: _joined(found[length]) for length in sorted(found, reverse=True)}

  def hit(self, text: str) -> str | None:
    """Name of a set of which the text contains a run of words, or None."""
    words = self._words(text)
    for length, (runs, owners) in self._runs.items():
      grams = _grams(words, length)
      places = np.minimum(np.searchsorted(runs, grams), len(runs) - 1)
      same = np.flatnonzero(runs[places] == grams)
      if len(same):
        return self.names[owners[places[same[0]]]]
    return None

  @property
  def sha256(self) -> str:
    """Hex digest of what is looked for."""
    whole = hashlib.sha256(repr(self.names).encode())
    for runs, owners in self._runs.values():
      whole.update(runs.tobytes() + owners.tobytes())
    return whole.hexdigest()

  def _words(self, text: str) -> np.ndarray:
    return np.fromiter(map(self._hashes.__getitem__, map(re.Match.group, _WORD.finditer(text.lower()))), np.uint64)


def _grams(words: np.ndarray, length: int) -> np.ndarray:
  """Hash of each run of so many words: a polynomial of theirs, modulo 2^64."""
  count = max(len(words) - length + 1, 0)
  grams = np.zeros(count, np.uint64)
  for place in range(length):
    grams = grams * _FACTOR + words[place:place + count]
  return grams


def _joined(found: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
  runs, first = np.unique(np.concatenate([grams for grams, _ in found]), return_index=True)
  owners = np.repeat(np.array([owner for _, owner in found], np.uint16), [len(grams) for grams, _ in found])
  return runs, owners[first]
