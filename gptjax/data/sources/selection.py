"""Selection of documents: the training and validation sides of a source, and samples of it."""

import bisect
import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction

from gptjax.config import UserError
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source

TRAINING_CHARACTERS = 50_000_000  # default amount of text to train a tokenizer on; reading and counting it takes some 10 seconds
_CHUNK = 2**16
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def split_source(source: Source, fraction: float) -> tuple[Source, Source]:
  """Splits a source into (training, validation). Both have the source's parts; each yields None for the other's documents.

  A document is held out if the hash of its name is among the lowest `fraction` of all hashes; other documents do not matter, except
  that, of known names, the lowest hash is always held out and the highest never. A single document is read, and its last `fraction`
  of characters is held out. Malformed records are for training. Raises a UserError if a single document is too short to split.
  """
  offsets: dict[int, int] = {}
  length = 0
  if len(source.names) == 1:
    for part in source.parts():
      offsets[part.start] = length
      length += sum(len(record.text) for record in source.read(part) if isinstance(record, Document))
    # Exact arithmetic on the decimal as written: in floats 1 - 0.9 is not 0.1.
    cut = int(length * (1 - Fraction(str(fraction))))
    if not 0 < cut < length:
      raise UserError('data.valid_fraction', fraction, 'a fraction that leaves text for both training and validation of '
                      f'the {length} characters of {source.names[0]}')
  else:
    limit: float = fraction * 2**64
    if source.names:
      hashes = sorted(map(_hash, source.names))
      limit = hashes[min(max(bisect.bisect_left(hashes, limit), 1), len(hashes) - 1)]
    cut = math.ceil(limit)  # hashes are integers
  return _Side(source, False, cut, offsets), _Side(source, True, cut, offsets)


def is_held_out(name: str, fraction: float) -> bool:
  """Whether the hash of a document's name selects it for validation."""
  return _hash(name) < fraction * 2**64


def _hash(name: str) -> int:
  # File names need not be UTF-8; Python represents other bytes as lone surrogates.
  return int.from_bytes(hashlib.sha256(name.encode(errors='surrogateescape')).digest()[:8])


class _Side(Source):
  """One side of a split: documents with a hash below `cut` are held out; of a single document, the characters from `cut` on."""

  def __init__(self, source: Source, held_out: bool, cut: int, offsets: dict[int, int]):
    self.source, self.held_out, self.cut = source, held_out, cut
    self.offsets = offsets  # of a single document's pieces in characters, by the start of their part
    self.description = f'{source.description}, {"validation" if held_out else "training"} side'
    self.size, self.skip, self.numbering = source.size, source.skip, source.numbering

  def parts(self) -> Iterator[Part]:
    return self.source.parts()

  def read(self, part: Part) -> Iterator[Record]:
    offset = self.offsets.get(part.start, 0)
    for record in self.source.read(part):
      if not isinstance(record, Document):
        yield None if self.held_out else record
      elif not self.offsets:
        yield record if (_hash(record.name) < self.cut) == self.held_out else None
      else:
        cut = max(0, self.cut - offset)
        offset += len(record.text)
        text = record.text[cut:] if self.held_out else record.text[:cut]
        yield Document(record.name, text) if text else None

  def fingerprint(self) -> str:
    return hashlib.sha256(f'{self.source.fingerprint()} {self.held_out} {self.cut}'.encode()).hexdigest()


def sample(source: Source, characters: int = TRAINING_CHARACTERS) -> Iterator[Document]:
  """Yields a fixed pseudo-random sample of about `characters` characters; everything if the source is no larger.

  Of a large source only some evenly spaced parts are read, with four times as much text. Documents, and chunks of 65,536 characters
  of longer ones, are selected by a hash of name and position. Raises a UserError if more of the records that were read are malformed
  than `source.skip` allows.
  """
  fraction = min(1.0, 4 * characters / max(source.size, 1))
  records, malformed = 0, []
  for index, part in enumerate(source.parts()):
    if index * _GOLDEN % 2**64 >= fraction * 2**64:  # Fibonacci hashing: evenly spaced, and part 0 is always read
      continue
    found = list(source.read(part))
    records += len(found)
    malformed += [(part, record) for record in found if isinstance(record, Malformed)]
    documents = [record for record in found if isinstance(record, Document)]
    chunks = [(number, start, document.name, document.text[start:start + _CHUNK]) for number, document in enumerate(documents)
              for start in range(0, len(document.text), _CHUNK)]
    # A part's size is in bytes as stored, possibly compressed or including fields without text, and not in characters.
    budget = characters * part.size / max(source.size, 1) / fraction
    share = budget / max(sum(len(text) for *_, text in chunks), 1)
    # The hash differs from the one that holds documents out, and includes the position, because pieces of a text share its name.
    yield from (Document(name, text) for number, start, name, text in chunks
                if _hash(f'{index} {number} {start} {name}') / 2**64 < share)
  if len(malformed) > source.skip * records:
    part, record = malformed[0]
    raise UserError(record.place or f'{part.file}, record {record.record + 1} from {part.start:,} on', record.value, record.expected)
