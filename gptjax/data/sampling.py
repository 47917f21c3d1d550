"""Which documents of a source a tokenizer is trained on, and which are kept from it: by hashes, the same every time."""

import hashlib
from collections.abc import Iterator

from gptjax.config import UserError
from gptjax.data.sources.source import Document, Malformed, Part, Source

TRAINING_CHARACTERS = 50_000_000
"""Most that a tokenizer learns from, unless asked for; reading and counting so many takes some 10 seconds."""

_STRETCH = 2**16
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


def sample(source: Source, characters: int = TRAINING_CHARACTERS) -> Iterator[Document]:
  """A fixed pseudo-random sample of a source's documents, of about so many characters; all of a source that has no more.

  Of a large source only some parts are read: those that hold four times as much, spread evenly. Of a part it takes
  documents by a hash of their name and place, and of a document that is longer than 65,536 characters, stretches of so
  many (each under the document's name), so a source of one huge text has a sample too.

  Args:
    source: where the documents are.
    characters: how many to give, about.

  Raises:
    UserError: of the records that were read, more than the source's `skip` are malformed.
  """
  opened = min(1.0, 4 * characters / max(source.size, 1))
  records, malformed = 0, []
  for index, part in enumerate(source.parts()):
    if index * _GOLDEN % 2**64 >= opened * 2**64:  # Fibonacci hashing: evenly spread, and never no part at all
      continue
    found = list(source.read(part))
    records += len(found)
    malformed += [(part, record) for record in found if isinstance(record, Malformed)]
    stretches = list(_stretches(index, [record for record in found if isinstance(record, Document)]))
    # A part's size is bytes as they lie there, compressed or with fields that are no text; what counts is characters.
    wanted = characters * part.size / max(source.size, 1) / opened
    share = wanted / max(sum(len(stretch.text) for _, stretch in stretches), 1)
    yield from (stretch for rank, stretch in stretches if rank < share)
  if len(malformed) > source.skip * records:
    raise _refused(*malformed[0])


def _stretches(part: int, documents: list[Document]) -> Iterator[tuple[float, Document]]:
  """Stretches of a part's documents, each with its rank from 0 to 1."""
  for number, document in enumerate(documents):
    for start in range(0, len(document.text), _STRETCH):
      # Not the hash that holds documents out; and the pieces of one text have one name, but not one place.
      place = f'{part} {number} {start} {document.name}'.encode(errors='surrogateescape')
      rank = int.from_bytes(hashlib.sha256(place).digest()[:8]) / 2**64
      yield rank, Document(document.name, document.text[start:start + _STRETCH])


def _refused(part: Part, record: Malformed) -> UserError:
  return UserError(f'{part.file}, record {record.record + 1} from {part.start:,} on', record.value, record.expected)
