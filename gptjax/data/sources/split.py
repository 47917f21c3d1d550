"""Training and validation sides of a source."""

import bisect
import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction

from gptjax.config import UserError
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source


def split_source(source: Source, fraction: float) -> tuple[Source, Source]:
  """Splits a source into (training, validation). Both have the source's parts; each yields None for the other's documents.

  A document is held out if the hash of its name is among the lowest `fraction` of all hashes, so that adding documents
  moves none from one side to the other. Where names are known without reading, the document with the lowest hash is always held
  out and that with the highest never. A source that is a single document is read, and its last `fraction` of characters is held
  out. Malformed records belong to the training side.

  Raises:
    UserError: a single document is too short to split, or cannot be read.
  """
  if len(source.names) == 1:
    return _split_by_position(source, fraction)
  limit: float = fraction * 2**64
  if source.names:
    hashes = sorted(map(_hash, source.names))
    limit = hashes[min(max(bisect.bisect_left(hashes, limit), 1), len(hashes) - 1)]
  cut = math.ceil(limit)  # hashes are integers
  return _SplitByHash(source, False, cut), _SplitByHash(source, True, cut)


def is_held_out(name: str, fraction: float) -> bool:
  """Whether the hash of a document's name selects it for validation."""
  return _hash(name) < fraction * 2**64


def _hash(name: str) -> int:
  # File names need not be UTF-8; Python represents other bytes as lone surrogates.
  return int.from_bytes(hashlib.sha256(name.encode(errors='surrogateescape')).digest()[:8])


class _Side(Source):
  """One side of a source that is split at `cut`: a hash or a position."""

  def __init__(self, source: Source, held_out: bool, cut: int):
    self.source, self.held_out, self.cut = source, held_out, cut
    self.description = f'{source.description}, {"validation" if held_out else "training"} side'
    self.size, self.skip = source.size, source.skip

  def parts(self) -> Iterator[Part]:
    return self.source.parts()

  def read(self, part: Part) -> Iterator[Record]:
    for record in self.source.read(part):
      yield None if self.held_out and isinstance(record, Malformed) else record

  def fingerprint(self) -> str:
    return hashlib.sha256(f'{self.source.fingerprint()} {self.held_out} {self.cut}'.encode()).hexdigest()

  def place(self, part: Part, record: int) -> str:
    return self.source.place(part, record)


class _SplitByHash(_Side):
  """The documents whose hashes are below the cut (held out), or the others."""

  def read(self, part: Part) -> Iterator[Record]:
    for record in super().read(part):
      other_side = isinstance(record, Document) and (_hash(record.name) < self.cut) != self.held_out
      yield None if other_side else record


class _SplitByPosition(_Side):
  """The start or the end of a document; `offsets` are the positions in characters of its pieces, by the start of their part."""

  def __init__(self, source: Source, held_out: bool, cut: int, offsets: dict[int, int]):
    super().__init__(source, held_out, cut)
    self._offsets = offsets

  def read(self, part: Part) -> Iterator[Record]:
    offset = self._offsets[part.start]
    for record in super().read(part):
      if isinstance(record, Document):
        cut = max(0, self.cut - offset)
        offset += len(record.text)
        text = record.text[cut:] if self.held_out else record.text[:cut]
        record = Document(record.name, text) if text else None
      yield record


def _split_by_position(source: Source, fraction: float) -> tuple[Source, Source]:
  offsets, length = {}, 0
  for part in source.parts():
    offsets[part.start] = length
    length += sum(len(record.text) for record in source.read(part) if isinstance(record, Document))
  # Exact arithmetic on the decimal as written: in floats 1 - 0.9 is not 0.1.
  cut = int(length * (1 - Fraction(str(fraction))))
  if not 0 < cut < length:
    raise UserError('data.valid_fraction', fraction, 'a fraction that leaves text for both training and validation of '
                    f'the {length} characters of {source.names[0]}')
  return _SplitByPosition(source, False, cut, offsets), _SplitByPosition(source, True, cut, offsets)
