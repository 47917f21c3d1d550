"""Held-out documents: the two sides of a source."""

import bisect
import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction

from gptjax.config import UserError
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source


def split_source(source: Source, fraction: float) -> tuple[Source, Source]:
  """Splits a source into (training, validation), which have its parts: each gives nothing for the other's records.

  A document is held out when the hash of its name falls into the lowest `fraction` of all hashes, so documents that
  come later do not move those already there. Where the names are known without reading, the lowest of two or more is
  always held out and the highest never. A source that is a single document is read to be split by position: its last
  `fraction` of characters is held out. Malformed records are on the side of training.

  Raises:
    UserError: a single document is too short to give both sides a character, or cannot be read.
  """
  if len(source.names) == 1:
    return _split_position(source, fraction)
  limit: float = fraction * 2**64
  if source.names:
    ranks = sorted(map(_rank, source.names))
    limit = ranks[min(max(bisect.bisect_left(ranks, limit), 1), len(ranks) - 1)]
  border = math.ceil(limit)  # ranks are whole numbers
  return _Hashed(source, False, border), _Hashed(source, True, border)


def is_held_out(name: str, fraction: float) -> bool:
  """Whether a document of this name is held out, where only the hash decides."""
  return _rank(name) < fraction * 2**64


def _rank(name: str) -> int:
  # Names of files need not be UTF-8; Python keeps what is not as lone surrogates.
  return int.from_bytes(hashlib.sha256(name.encode(errors='surrogateescape')).digest()[:8])


class _Side(Source):
  """One side of a source; `border` is where the two meet."""

  def __init__(self, source: Source, held_out: bool, border: int):
    self.source = source
    self.held_out = held_out
    self.border = border
    self.description = f'{source.description}, {"only" if held_out else "without"} what is held out'
    self.size = source.size
    self.skip = source.skip

  def parts(self) -> Iterator[Part]:
    return self.source.parts()

  def read(self, part: Part) -> Iterator[Record]:
    for record in self.source.read(part):
      yield None if self.held_out and isinstance(record, Malformed) else record

  def fingerprint(self) -> str:
    return hashlib.sha256(f'{self.source.fingerprint()} {self.held_out} {self.border}'.encode()).hexdigest()

  def place(self, part: Part, record: int) -> str:
    return self.source.place(part, record)


class _Hashed(_Side):
  """Documents whose names rank below or above the border."""

  def read(self, part: Part) -> Iterator[Record]:
    for record in super().read(part):
      other = isinstance(record, Document) and (_rank(record.name) < self.border) != self.held_out
      yield None if other else record


class _Positioned(_Side):
  """The beginning or the end of a document that comes in pieces."""

  def __init__(self, source: Source, held_out: bool, cut: int, begins: dict[int, int]):
    super().__init__(source, held_out, cut)
    self._begins = begins

  def read(self, part: Part) -> Iterator[Record]:
    begin = self._begins[part.start]
    for record in super().read(part):
      if isinstance(record, Document):
        cut = max(0, self.border - begin)
        begin += len(record.text)
        text = record.text[cut:] if self.held_out else record.text[:cut]
        record = Document(record.name, text) if text else None
      yield record


def _split_position(source: Source, fraction: float) -> tuple[Source, Source]:
  begins, length = {}, 0
  for part in source.parts():
    begins[part.start] = length
    length += sum(len(record.text) for record in source.read(part) if isinstance(record, Document))
  # Exact arithmetic on the decimal that was written: in floats 1 - 0.9 is not 0.1.
  cut = int(length * (1 - Fraction(str(fraction))))
  if not 0 < cut < length:
    raise UserError('data.valid_fraction', fraction, f'a share that leaves both training and validation text of '
                    f'the {length} characters of {source.names[0]}')
  return _Positioned(source, False, cut, begins), _Positioned(source, True, cut, begins)
