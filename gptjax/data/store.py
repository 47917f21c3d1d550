"""Token stores: documents as one stream of ids, on disk or in object storage, verified on reading.

A store is a folder or URL with

    manifest.json   origin, counts, and the digest of the index
    index.bin       one RECORD per shard: ids and documents up to its end, digest of its file
    00000.shard     tokens; then the position of each document among them; then a CRC-32 of every BLOCK bytes of both
    tokenizer/      the tokenizer

A document is a separator followed by its ids. The stream is circular: a document ends with the separator of the next one, and
the last with that of the first. So each id is a target exactly once.

If a tokenizer's bos and eos differ, as Llama's do, the separator is bos, and a document's last id is eos; bos is then not a target,
because it follows an unrelated text.

In a store of examples, a document is what a model reads and answers: ids that start a prompt, the prompt, the answer, and the id that
ends it. Beside each id is the weight of the loss of the next one. Several parts of an example, such as the two of a pair of answers, lie
one behind the other, and the last id of each but the last has PART_END for a weight.
The last id of a text to classify is the number of its class.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import UserError
from gptjax.data.folders import LocalFolder, damaged, open_folder
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.files import json_object, sync, write_json

VERSION = 2  # to be incremented when older stores become unreadable
BLOCK = 2**14  # bytes per checksum: a row of 1,024 ids spans one or two blocks
MANIFEST, INDEX, TOKENIZER = 'manifest.json', 'index.bin', 'tokenizer'
PART_END = -1.0
RECORD = np.dtype([('tokens', '<i8'), ('documents', '<i8'), ('sha256', 'S64')])


def manifest_sha256(manifest: dict[str, Any]) -> str:
  """Hex digest of a manifest's other entries."""
  facts = {name: value for name, value in manifest.items() if name != 'sha256'}
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def shard_name(number: int) -> str:
  """File name of a shard."""
  return f'{number:05}.shard'


def token_dtype(vocab_size: int, weighted: bool = False) -> np.dtype:
  """uint16, or uint32 for vocabularies above 65,536 ids; in a store of examples, `id` and `weight`, a float16."""
  ids = '<u2' if vocab_size <= 2**16 else '<u4'
  return np.dtype([('id', ids), ('weight', '<f2')]) if weighted else np.dtype(ids)


@dataclasses.dataclass(eq=False)
class Shard:
  """Layout of a shard's file, and the blocks verified so far."""

  name: str
  first_token: int
  first_document: int
  tokens: int
  documents: int
  itemsize: int
  """bytes of a token"""

  def __post_init__(self) -> None:
    self.mapped: np.ndarray | None = None
    """[tokens], if the file is memory-mapped"""
    self.checksums = np.empty(0, '<u4')
    """[blocks] CRC-32s, once they have been read"""
    self.verified = bytearray()
    """1 for each verified block"""
    self.stop = self.tokens * self.itemsize
    """bytes of tokens"""
    self.starts = self.stop + -self.stop % 8
    """offset of the documents' positions"""
    self.sums = self.starts + 8 * self.documents
    """offset of the checksums"""
    self.size = self.sums + 4 * -(-self.sums // BLOCK)
    """bytes of the file"""


class TokenStore:
  """A stream of documents. Opening reads only the manifest; the index is read with the first ids.

  Ranges of ids, or of weights, are read from memory maps or, at a URL, with one request each, all of a call concurrently. Every
  block is verified against its CRC-32 before it is first used.
  """

  def __init__(self, location: str, manifest: dict[str, Any]):
    self.location, self.manifest = location, manifest
    self.tokens: int = manifest['tokens']
    """ids in the stream"""
    self.documents: int = manifest['documents']
    self.bytes: int = manifest['bytes']
    """UTF-8 bytes of all documents"""
    self.vocab_size: int = manifest['vocab_size']
    self.separator: int = manifest['separator']
    """id that starts documents, and occurs nowhere else"""
    self.end: int = manifest['end']
    """id that ends documents: the separator, or each document's last id"""
    examples = manifest.get('examples')
    self.weighted = examples is not None
    """whether it has examples, with weights of the loss"""
    self.label_counts: dict[str, int] = examples.get('labels', {}) if examples else {}
    """number of texts of each class, by the classes' names in their order; empty if its texts have none"""
    self.labels = tuple(self.label_counts)
    self.dtype = token_dtype(self.vocab_size, self.weighted)
    self.targets: float = examples['targets'] if examples else (
      self.tokens if self.end == self.separator else self.tokens - self.documents)
    """ids that are targets, each once; of examples the sum of their weights"""
    self.target_bytes: float = examples['target_bytes'] if examples else self.bytes
    """UTF-8 bytes that the targets stand for"""
    self.parts: int = examples.get('parts', 1) if examples else 0
    """of an example: 2 or 3 in pairs; 0 in documents"""
    self.sha256: str = manifest['index_sha256']
    """hex digest of ids and documents"""
    self.tokenizer_sha256: str = manifest['tokenizer_sha256']
    self._folder = open_folder(location)
    self._shards: dict[int, Shard] = {}

  @staticmethod
  def open(location: Path | str) -> 'TokenStore':
    """Opens the store in a folder or at a URL. Raises a UserError if there is no store, or one of another version."""
    manifest = json_object(f'{location}/{MANIFEST}', open_folder(str(location)).read(MANIFEST))
    if manifest.get('version') != VERSION:
      raise UserError(f'{location}/{MANIFEST}, version', manifest.get('version'), f'{VERSION}; prepare the store again')
    if manifest.get('sha256') != manifest_sha256(manifest):
      raise damaged(f'{location}/{MANIFEST}', manifest.get('sha256'), 'the manifest')
    return TokenStore(str(location), manifest)

  def __reduce__(self):
    return TokenStore, (self.location, self.manifest)  # a process that unpickles it maps the files itself

  def tokenizer(self) -> Tokenizer:
    """The tokenizer that made the ids; raises a UserError if the folder has another one."""
    found = load_tokenizer(self._folder.local(TOKENIZER))
    if found.sha256 != self.tokenizer_sha256:
      raise damaged(f'{self.location}/{TOKENIZER}', found.sha256[:12], f'the tokenizer {self.tokenizer_sha256[:12]}')
    return found

  @functools.cached_property
  def index(self) -> np.ndarray:
    """One RECORD per shard."""
    data = self._folder.read(INDEX)
    if hashlib.sha256(data).hexdigest() != self.sha256:
      raise damaged(f'{self.location}/{INDEX}', f'{len(data)} bytes', 'the index')
    return np.frombuffer(data, RECORD)

  def check(self) -> None:
    """Raises a UserError that names a shard that is missing or does not have its size."""
    sizes = self._folder.sizes()
    for shard in map(self._shard, range(len(self.index))):
      if (found := sizes.get(shard.name)) != shard.size:
        raise damaged(f'{self.location}/{shard.name}', found if found is None else f'{found:,} bytes', f'{shard.size:,} bytes')

  def verify(self) -> None:
    """Reads everything; raises a UserError that names a shard or tokenizer with another SHA-256."""
    self.check()
    self.tokenizer()
    for number, expected in enumerate(self.index['sha256'].tolist()):
      if (found := self._folder.sha256(shard_name(number))) != expected.decode():
        raise damaged(f'{self.location}/{shard_name(number)}', f'SHA-256 {found}', expected.decode())

  def read(self, starts: np.ndarray | Sequence[int], counts: np.ndarray | Sequence[int], out: np.ndarray | None = None,
           places: np.ndarray | None = None, field: str = 'id') -> np.ndarray:
    """Reads ranges of the circular stream, given by starts (0 to tokens - 1) and numbers of ids, one after another.

    They are written to `places` of `out`, or concatenated; `field` may also be `weight`, in a store of examples. Raises a UserError that
    names the file if a block is damaged.
    """
    starts, counts = np.asarray(starts, np.int64), np.asarray(counts, np.int64)
    column = lambda tokens: tokens[field] if self.weighted else tokens
    if out is None or places is None:
      out, places = np.empty(counts.sum(), column(np.empty(0, self.dtype)).dtype), np.cumsum(counts) - counts
    pieces, size = list(self._pieces(starts, counts, places)), self.dtype.itemsize
    if isinstance(self._folder, LocalFolder):  # copies from views of the map, and not of the enclosing blocks, for speed
      self._folder.count_touched(len(pieces), size * int(counts.sum()))
      for shard, first, stop, at in pieces:
        if shard.mapped is None or shard.verified.find(0, first * size // BLOCK, -(-stop * size // BLOCK)) >= 0:
          list(self._bytes([(shard, first * size, stop * size)]))
          shard.mapped = self._folder.mapped(shard.name)[:shard.stop].view(self.dtype)
        out[at:at + stop - first] = column(shard.mapped[first:stop])
    else:
      wanted = [(shard, first * size, stop * size) for shard, first, stop, _ in pieces]
      for (_, first, stop, at), data in zip(pieces, self._bytes(wanted)):
        out[at:at + stop - first] = column(data.view(self.dtype))
    return out

  def _pieces(self, starts: np.ndarray, counts: np.ndarray, places: np.ndarray) -> Iterator[tuple[Shard, int, int, int]]:
    """Cuts ranges of the stream at the ends of shards; yields (shard, first and stop within it, place)."""
    numbers = np.searchsorted(self.index['tokens'], starts, 'right')
    for number, start, count, at in zip(*(values.tolist() for values in (numbers, starts, counts, places))):
      while count:
        shard = self._shards.get(number) or self._shard(number)
        first = start - shard.first_token
        stop = min(first + count, shard.tokens)
        yield shard, first, stop, at
        at += stop - first
        count -= stop - first
        number = (number + 1) % len(self.index)
        start = self._shard(number).first_token if count else start

  def starts(self, first: int, stop: int) -> np.ndarray:
    """Positions of documents [first, stop) and the end of the last, as int64 [stop - first + 1]."""
    found = []
    at, last = first, min(stop + 1, self.documents)
    while at < last:
      shard = self._shard(int(np.searchsorted(self.index['documents'], at, 'right')))
      begin, end = at - shard.first_document, min(last - shard.first_document, shard.documents)
      data, = self._bytes([(shard, shard.starts + 8 * begin, shard.starts + 8 * end)])
      found.append(data.view('<i8') + shard.first_token)
      at = shard.first_document + end
    return np.concatenate([*found, [self.tokens]] if stop == self.documents else found)

  def _shard(self, number: int) -> Shard:
    if number not in self._shards:
      tokens, documents, _ = self.index[number - 1].item() if number else (0, 0, b'')
      end, last, _ = self.index[number].item()
      self._shards[number] = Shard(shard_name(number), tokens, documents, end - tokens, last - documents, self.dtype.itemsize)
    return self._shards[number]

  def _bytes(self, wanted: Sequence[tuple[Shard, int, int]]) -> Iterator[np.ndarray]:
    """Reads byte ranges of shards and verifies the blocks that contain them."""
    spans = [(shard.name, first // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, shard.sums)) for shard, first, stop in wanted]
    unknown = list({shard.name: shard for shard, _, _ in wanted if not shard.verified}.values())
    for shard, sums in zip(unknown, self._folder.ranges([(shard.name, shard.sums, shard.size) for shard in unknown])):
      shard.checksums, shard.verified = sums.view('<u4'), bytearray(len(sums) // 4)
    for (shard, first, stop), (_, begin, end), data in zip(wanted, spans, self._folder.ranges(spans)):
      for at in range(begin, end, BLOCK):
        if not shard.verified[at // BLOCK]:
          if zlib.crc32(data[at - begin:at - begin + BLOCK].data) != shard.checksums[at // BLOCK]:
            raise damaged(f'{self.location}/{shard.name}', f'another CRC-32 from byte {at:,} on', 'the bytes')
          shard.verified[at // BLOCK] = 1
      yield data[first - begin:stop - begin]


class ShardRecord(NamedTuple):
  """A finished shard."""

  tokens: int
  documents: int
  bytes: int
  """UTF-8 bytes of its documents"""
  sha256: str


class ShardWriter:
  """Writes shard `number` of a store to a temporary file, which `close` renames."""

  def __init__(self, directory: Path, number: int, dtype: np.dtype):
    self._itemsize = dtype.itemsize
    self._path = directory / shard_name(number)
    self._partial = self._path.with_suffix('.partial')
    self._file = self._partial.open('wb')
    self._digest = hashlib.sha256()
    self._lengths: list[np.ndarray] = []
    self._checksums: list[int] = []
    self._incomplete = b''  # of the last block
    self.tokens = 0
    self.bytes = 0

  def append(self, documents: Sequence[bytes], text_bytes: int) -> None:
    """Appends documents: the bytes of their tokens, separators included, and the UTF-8 bytes of all their texts."""
    self._write(b''.join(documents))
    self._lengths.append(np.array([len(ids) // self._itemsize for ids in documents]))
    self.tokens += int(self._lengths[-1].sum())
    self.bytes += text_bytes

  def close(self) -> ShardRecord:
    """Finishes the shard and waits until it is on disk."""
    lengths = np.concatenate(self._lengths)
    self._write(bytes(-self._file.tell() % 8))
    self._write((np.cumsum(lengths) - lengths).astype('<i8').tobytes())
    if self._incomplete:
      self._checksums.append(zlib.crc32(self._incomplete))
    self._write(np.asarray(self._checksums, '<u4').tobytes(), checked=False)
    self._file.close()
    sync(self._partial)
    self._partial.rename(self._path)
    sync(self._path.parent)
    return ShardRecord(self.tokens, len(lengths), self.bytes, self._digest.hexdigest())

  def _write(self, data: bytes, checked: bool = True) -> None:
    self._file.write(data)
    self._digest.update(data)
    if checked:
      data = self._incomplete + data
      complete = len(data) // BLOCK * BLOCK
      self._checksums += [zlib.crc32(memoryview(data)[at:at + BLOCK]) for at in range(0, complete, BLOCK)]
      self._incomplete = data[complete:]


def finish_store(directory: Path, tokenizer: Tokenizer, shards: list[ShardRecord], facts: dict[str, Any]) -> None:
  """Writes tokenizer, index and, last, the manifest, which also contains `facts`."""
  index = np.zeros(len(shards), RECORD)
  index['tokens'] = np.cumsum([shard.tokens for shard in shards])
  index['documents'] = np.cumsum([shard.documents for shard in shards])
  index['sha256'] = [shard.sha256.encode() for shard in shards]
  (directory / INDEX).write_bytes(index.tobytes())
  tokenizer.save(directory / TOKENIZER)
  for path in (directory / INDEX, *(directory / TOKENIZER).iterdir(), directory / TOKENIZER):
    sync(path)
  manifest = {
    'version': VERSION, 'documents': int(index['documents'][-1]), 'tokens': int(index['tokens'][-1]),
    'bytes': sum(shard.bytes for shard in shards), 'shards': len(shards),
    'vocab_size': tokenizer.vocab_size, 'separator': tokenizer.bos_id, 'end': tokenizer.eos_id, 'tokenizer_sha256': tokenizer.sha256,
    'index_sha256': hashlib.sha256(index.tobytes()).hexdigest(), **facts,
  }
  write_json(directory / MANIFEST, manifest | {'sha256': manifest_sha256(manifest)})
