"""Selection of documents: the training and validation sides of a source, and samples of it."""

import dataclasses
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping
from fractions import Fraction

from gptjax.config import UserError
from gptjax.data.progress import counted
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source, documents

TRAINING_CHARACTERS = 50_000_000  # default amount of text to train a tokenizer on; reading and counting it takes some 10 seconds
_MEASURED_BYTES = 2**26  # sources up to this size are read before they are split, which takes about a second
_LEAST_HELD_OUT = 32  # documents that a larger source holds out at least, so that their amount is off by a sixth (standard deviation)
_CHUNK = 2**16
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def split_source(source: Source, fraction: float) -> tuple[Source, Source]:
  """Splits a source into (training, validation). Both have the source's parts; each yields its part of every document, or None.

  Documents are held out in the order of a hash of their names. If their amounts of text are known, or the source is small enough to
  read them first, `fraction` of the text is held out up to a quarter: documents that fit, or if too few do also the end of one that
  does not; of a single document exactly its end. A larger source is split document by document: those with a hash among the lowest
  `fraction` of all hashes, and the end of each one that is a notable part of what is held out. Malformed records are for training.
  Raises a UserError if a side would be empty, or a source that is read first has too many malformed records.
  """
  share = Fraction(str(fraction))  # the decimal as written: in floats 1 - 0.9 is not 0.1
  amounts = source.document_bytes
  rule: _Rule | None
  if not amounts and source.size > _MEASURED_BYTES:
    rule = _by_hash(source, share)
    if source.has_examples:
      rule = dataclasses.replace(rule, longest=sys.maxsize, words=rule.words.partition(',')[0])
  else:
    if len(amounts) < 2:
      amounts = {document.name: len(document.text) for document in documents(source)}
    place = next((part.file for part in source.parts()), source.description)
    if not amounts:
      raise UserError('data.source.path', place, 'documents with text')
    if source.has_examples:
      rule = _whole(amounts, share)
    else:
      rule = _end(amounts, share) if 1 in (len(amounts), len(source.document_bytes)) else _by_amount(amounts, share)
    if not rule:
      raise UserError('data.valid_fraction', fraction, 'a fraction that leaves text for both training and validation of the '
                      f'{sum(amounts.values()):,} characters of {place}')
  return _Side(source, False, rule), _Side(source, True, rule)


def is_held_out(name: str, fraction: float) -> bool:
  """Whether the hash of a document's name selects it for validation."""
  return _hash(name) < fraction * 2**64


def _hash(name: str) -> int:
  # File names need not be UTF-8; Python represents other bytes as lone surrogates.
  return int.from_bytes(hashlib.sha256(name.encode(errors='surrogateescape')).digest()[:8])


@dataclasses.dataclass(frozen=True)
class _Rule:
  """What is held out: documents with a hash below `limit`, and the end of others."""

  limit: int
  shares: dict[int, Fraction]
  """exceptions by the hash of a document: the fraction of its characters that is held out"""
  words: str
  """description"""
  longest: int = sys.maxsize
  """characters of the longest document that is on one side"""
  share: Fraction = Fraction(0)
  """held-out fraction of the characters of longer documents"""

  def cut(self, document: Document) -> int:
    """The character from which on a document is held out."""
    number, length = _hash(document.name), len(document.text)
    share = self.shares.get(number, self.share if length > self.longest else int(number < self.limit))
    return int(length * (1 - share))


def _end(amounts: Mapping[str, int], fraction: Fraction) -> _Rule | None:
  """Holds out the end of one document, which may be in pieces; None if the document is too short."""
  total = sum(amounts.values())
  cut, offset, shares = int(total * (1 - fraction)), 0, {}
  for name, amount in amounts.items():
    shares[_hash(name)] = Fraction(min(max(offset + amount - cut, 0), amount), amount)
    offset += amount
  words = f'{_percent((total - cut) / total)} of the text: the end of {next(iter(amounts))}'
  return _Rule(0, shares, words) if 0 < cut < total else None


def _by_amount(amounts: Mapping[str, int], fraction: Fraction) -> _Rule | None:
  """Holds out a fraction of the amount of text, up to a quarter of the smaller side; None if a side would be empty."""
  total = sum(amounts.values())
  wanted = total * fraction
  slack = min(wanted, total - wanted) / 4
  least, most, threshold = math.ceil(wanted - slack), math.floor(wanted + slack), math.ceil(fraction * 2**64)
  limit, shares, held, count, words = 2**64, dict[int, Fraction](), 0, 0, ''
  ordered = sorted((_hash(name), amount, name) for name, amount in amounts.items())
  for number, amount, _ in ordered:
    # Within the slack the hash alone decides, so that few documents change sides when others are added.
    if held >= least and number >= threshold:
      limit = number
      break
    if held + amount <= most:
      held, count = held + amount, count + 1
    else:
      shares[number] = Fraction(0)
  if held < least and shares:
    number, amount, name = next(one for one in ordered if one[0] in shares)
    end = max(min(round(wanted - held), amount - 1), int(not held))
    shares[number] = Fraction(end, amount)
    held, words = held + end, f'the end of {name}'
  words = ' and '.join(filter(None, [f'{count:,} of {counted(len(amounts))}' if count else '', words]))
  return _Rule(limit, shares, f'{_percent(held / total)} of the text: {words}') if 0 < held < total else None


def _whole(amounts: Mapping[str, int], fraction: Fraction) -> _Rule | None:
  """Holds out a fraction of the examples, and one at least; None if a side would be empty."""
  count = max(1, round(len(amounts) * fraction))
  if count >= len(amounts):
    return None
  limit = sorted(map(_hash, amounts))[count]
  return _Rule(limit, {}, f'{count:,} of {counted(len(amounts))}')


def _by_hash(source: Source, fraction: Fraction) -> _Rule:
  longest = int(source.size * fraction / _LEAST_HELD_OUT)
  return _Rule(math.ceil(fraction * 2**64), {}, f'about {_percent(fraction)} of the text: documents by a hash of their names, and the end '
               f'of each one above {longest:,} characters', longest, fraction)


def _percent(fraction: float | Fraction) -> str:
  return f'{100 * float(fraction):.3g}%'


class _Side(Source):
  """One side of a split."""

  def __init__(self, source: Source, validates: bool, rule: _Rule):
    self.source, self.validates, self.rule, self.held_out = source, validates, rule, rule.words
    self.description = f'{source.description}, {"validation" if validates else "training"} side'
    self.size, self.skip, self.numbering = source.size, source.skip, source.numbering
    self.has_examples, self.labels = source.has_examples, source.labels

  def parts(self) -> Iterator[Part]:
    return self.source.parts()

  def read(self, part: Part) -> Iterator[Record]:
    for record in self.source.read(part):
      if isinstance(record, Document):
        cut = self.rule.cut(record)
        if self.has_examples:  # each is whole on one side
          yield record if self.validates == (not cut) else None
          continue
        text = record.text[cut:] if self.validates else record.text[:cut]
        yield Document(record.name, text) if text else None
      else:
        yield None if self.validates else record

  def fingerprint(self) -> str:
    return hashlib.sha256(f'{self.source.fingerprint()} {self.validates} {self.rule}'.encode()).hexdigest()


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
    texts = [record for record in found if isinstance(record, Document)]
    chunks = [(number, start, document.name, document.text[start:start + _CHUNK]) for number, document in enumerate(texts)
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
