"""A source in memory for tests."""

import hashlib

from gptjax.data.sources.source import Document, Malformed, Part, Source


class Memory(Source):
  """A source of records in parts of `per_part`; `read_parts` lists the parts that were read."""

  description = 'memory'

  def __init__(self, records, per_part=10, skip=0.0, bytes_each=None):
    self.records, self.per_part, self.skip = records, per_part, skip
    self.sizes = [bytes_each or len(record.text if isinstance(record, Document) else record.value) for record in records]
    self.size = sum(self.sizes)
    self.read_parts = []

  def parts(self):
    for start in range(0, len(self.records), self.per_part):
      stop = min(start + self.per_part, len(self.records))
      yield Part('memory', '', start, stop, sum(self.sizes[start:stop]))

  def read(self, part):
    self.read_parts.append(part.start // self.per_part)
    yield from self.records[part.start:part.stop]

  def fingerprint(self):
    return hashlib.sha256(repr(self.records).encode()).hexdigest()


def documents(count, length=100):
  return [Document(f'{i:05d}', chr(97 + i % 26) * length) for i in range(count)]


def malformed(record):
  return Malformed('{', 'JSON', record)
