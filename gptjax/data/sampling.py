"""Samples of documents for training tokenizers, selected by hashes and therefore reproducible."""

import hashlib
from collections.abc import Iterator

from gptjax.config import UserError
from gptjax.data.sources.source import Document, Malformed, Source

TRAINING_CHARACTERS = 50_000_000
"""Default amount of text to train a tokenizer on; reading and counting it takes some 10 seconds."""

_CHUNK = 2**16
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def sample(source: Source, characters: int = TRAINING_CHARACTERS) -> Iterator[Document]:
  """Yields a fixed pseudo-random sample of a source of about `characters` characters; everything if the source is no larger.

  Of a large source only some parts are read, evenly spaced, with four times as much text. Documents are selected by a hash
  of name and position. Documents longer than 65,536 characters are sampled in chunks of that length, each with the document's name,
  so that a source of one huge text also has a sample.

  Raises:
    UserError: of the records that were read, a larger fraction than `source.skip` is malformed.
  """
  fraction = min(1.0, 4 * characters / max(source.size, 1))
  records, malformed = 0, []
  for index, part in enumerate(source.parts()):
    if index * _GOLDEN % 2**64 >= fraction * 2**64:  # Fibonacci hashing: evenly spaced, and part 0 is always read
      continue
    found = list(source.read(part))
    records += len(found)
    malformed += [(part, record) for record in found if isinstance(record, Malformed)]
    chunks = list(_chunks(index, [record for record in found if isinstance(record, Document)]))
    # A part's size is in bytes as stored, possibly compressed or including fields without text, and not in characters.
    budget = characters * part.size / max(source.size, 1) / fraction
    share = budget / max(sum(len(chunk.text) for _, chunk in chunks), 1)
    yield from (chunk for rank, chunk in chunks if rank < share)
  if len(malformed) > source.skip * records:
    part, record = malformed[0]
    raise UserError(f'{part.file}, record {record.record + 1} from {part.start:,} on', record.value, record.expected)


def _chunks(part: int, documents: list[Document]) -> Iterator[tuple[float, Document]]:
  """Yields chunks of documents, each with its rank from 0 to 1."""
  for number, document in enumerate(documents):
    for start in range(0, len(document.text), _CHUNK):
      # Another hash than the one that holds documents out. It includes the position, because pieces of a text share its name.
      key = f'{part} {number} {start} {document.name}'.encode(errors='surrogateescape')
      rank = int.from_bytes(hashlib.sha256(key).digest()[:8]) / 2**64
      yield rank, Document(document.name, document.text[start:start + _CHUNK])
