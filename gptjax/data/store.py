"""Token stores: documents as one stream of ids on disk or in object storage, in shards, checked whenever they are read.

A store is a folder or URL with

    manifest.json   what it was made from, counts, and the digest of the index
    index.bin       a RECORD a shard: ids and documents up to its end, digest of its file
    00000.shard     ids; then the place of each document among them; then a CRC-32 of every BLOCK bytes of both
    tokenizer/      the tokenizer

A document is a separator and its ids. The stream is a circle: what ends a document is the separator that begins the next,
and what ends the last is the first. So each of its ids is a target exactly once.

Of a tokenizer whose bos and eos differ, such as Llama's, the separator is bos and a document has its eos as its last id. What
follows eos is another text, which nothing foretells: bos is then no target.
"""

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.folders import LocalFolder, Range, open_folder
from gptjax.data.tokenizers import Tokenizer, load_tokenizer

VERSION = 2
"""Of the format; raise it when stores of before can no longer be read."""

BLOCK = 2**14
"""Bytes under one checksum: a row of 1,024 ids lies in one block or two, and each is checked once."""

MANIFEST, INDEX, TOKENIZER = 'manifest.json', 'index.bin', 'tokenizer'
RECORD = np.dtype([('tokens', '<i8'), ('documents', '<i8'), ('sha256', 'S64')])


def manifest_sha256(manifest: dict[str, Any]) -> str:
  """Hex digest of what a manifest says beside this digest."""
  facts = {name: value for name, value in manifest.items() if name != 'sha256'}
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def shard_name(number: int) -> str:
  """File name of a shard."""
  return f'{number:05}.shard'


@dataclasses.dataclass(eq=False)
class Shard:
  """Where things lie in one file of a store."""

  name: str
  first_token: int
  first_document: int
  tokens: int
  documents: int
  itemsize: int
  """bytes of an id"""
  mapped: np.ndarray | None = None
  """[tokens] its ids, where the file is mapped"""
  checksums: np.ndarray | None = None
  """[blocks] CRC-32s, once they were needed"""
  checked: bytearray = dataclasses.field(default_factory=bytearray)
  """1 for each block that was found as it was written"""

  @property
  def ids(self) -> int:
    """Bytes of its ids."""
    return self.tokens * self.itemsize

  @property
  def starts(self) -> int:
    """Place of its documents' places, aligned to their 8 bytes."""
    return self.ids + -self.ids % 8

  @property
  def sums(self) -> int:
    """Place of its checksums."""
    return self.starts + 8 * self.documents

  @property
  def size(self) -> int:
    """Bytes of the file."""
    return self.sums + 4 * -(-self.sums // BLOCK)

  def blocks(self, first: int, stop: int) -> Range:
    """The whole blocks that hold bytes first, ..., stop - 1."""
    return self.name, first // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, self.sums)


class TokenStore:
  """A stream of documents. Opening one reads its manifest, whatever its size; the index comes with the first ids.

  Ids are read in ranges, out of memory maps or, where the store is a URL, with a request a range, all of a call at once.
  Every block is compared with its CRC-32 before it is first used.

  Args:
    place: folder or URL.
    manifest: what its manifest.json says.
  """

  def __init__(self, place: str, manifest: dict[str, Any]):
    self.place = place
    self.manifest = manifest
    self.dtype = np.dtype(manifest['dtype'])
    self.tokens: int = manifest['tokens']
    """ids in the stream"""
    self.documents: int = manifest['documents']
    """documents in the stream"""
    self.bytes: int = manifest['bytes']
    """UTF-8 bytes of all documents"""
    self.vocab_size: int = manifest['vocab_size']
    """ids are below this"""
    self.separator: int = manifest['separator']
    """id that begins documents, and stands nowhere else"""
    self.end: int = manifest['end']
    """id that ends documents; the separator itself, or each document's last one"""
    self.targets = self.tokens if self.end == self.separator else self.tokens - self.documents
    """ids that are targets, each once"""
    self.sha256: str = manifest['index_sha256']
    """hex digest; equal for equal ids and documents"""
    self.tokenizer_sha256: str = manifest['tokenizer_sha256']
    """hex digest of the tokenizer that made the ids"""
    self._folder = open_folder(place)
    self._shards: dict[int, Shard] = {}

  @staticmethod
  def open(place: Path | str) -> 'TokenStore':
    """Opens a store.

    Raises:
      UserError: there is none, or one of another version.
    """
    try:
      manifest = json.loads(open_folder(str(place)).read(MANIFEST))
    except UserError:
      raise
    except (OSError, ValueError, RecursionError) as error:
      reason = 'none is there' if isinstance(error, FileNotFoundError) else str(error)
      raise UserError('token store', str(place), f'a folder or URL with a token store, which tools.prepare_data makes ({reason})') from None
    version = manifest.get('version') if isinstance(manifest, dict) else None
    if version != VERSION:
      raise UserError(f'{place}/{MANIFEST}, version', version, f'{VERSION}, which this code reads; prepare it again')
    if manifest.get('sha256') != manifest_sha256(manifest):
      raise UserError(f'{place}/{MANIFEST}', manifest.get('sha256'), 'a manifest as it was written; restore it, or prepare the store again')
    return TokenStore(str(place), manifest)

  def __reduce__(self):
    return TokenStore, (self.place, self.manifest)  # a process that gets a copy maps the files itself

  def tokenizer(self) -> Tokenizer:
    """The tokenizer that made the ids.

    Raises:
      UserError: another one lies there.
    """
    found = load_tokenizer(self._folder.local(TOKENIZER))
    if found.sha256 != self.tokenizer_sha256:
      raise UserError(f'{self.place}/{TOKENIZER}', found.sha256[:12], f'the tokenizer {self.tokenizer_sha256[:12]}, with which the '
                      'store was made; restore it, or prepare the store again')
    return found

  @functools.cached_property
  def index(self) -> np.ndarray:
    """A RECORD for each shard."""
    data = self._folder.read(INDEX)
    if hashlib.sha256(data).hexdigest() != self.sha256:
      raise UserError(f'{self.place}/{INDEX}', f'{len(data)} bytes', 'the index as it was written; restore it, or prepare the store again')
    return np.frombuffer(data, RECORD)

  def check(self) -> None:
    """Compares the size of every shard with the index, without reading one.

    Raises:
      UserError: a shard is missing or not of its size; it is named.
    """
    sizes = self._folder.sizes()
    for number in range(len(self.index)):
      shard = self._shard(number)
      if sizes.get(shard.name) != shard.size:
        found = f'{sizes[shard.name]:,} bytes' if shard.name in sizes else None
        raise UserError(f'{self.place}/{shard.name}', found,
                        f'{shard.size:,} bytes, as it was written; restore it, or prepare the store again')

  def verify(self) -> None:
    """Reads every shard and compares its SHA-256 with the index, and the tokenizer's with the manifest.

    Raises:
      UserError: something is not as it was written; it is named.
    """
    self.check()
    self.tokenizer()
    for number, record in enumerate(self.index):
      if (found := self._folder.sha256(shard_name(number))) != record['sha256'].decode():
        raise self._damaged(shard_name(number), f'SHA-256 {found}', f'{record["sha256"].decode()}')

  def read(self, starts: np.ndarray | Sequence[int], counts: np.ndarray | Sequence[int]) -> np.ndarray:
    """Ids of ranges of the circle, one range after another.

    Args:
      starts: places, from 0 to tokens - 1.
      counts: ids of each range.

    Raises:
      UserError: a block is not as it was written; its file is named.
    """
    starts, counts = np.asarray(starts, np.int64), np.asarray(counts, np.int64)
    out = np.empty(counts.sum(), self.dtype)
    pieces = list(self._pieces(starts, counts))
    if isinstance(self._folder, LocalFolder):  # a view of the map instead of the blocks around it
      self._folder.reading(len(pieces), out.nbytes)
      for shard, first, stop, at in pieces:
        out[at:at + stop - first] = self._mapped(shard, first, stop)
    else:
      size = self.dtype.itemsize
      wanted = [(shard, first * size, stop * size) for shard, first, stop, _ in pieces]
      for (_, first, stop, at), data in zip(pieces, self._bytes(wanted)):
        out[at:at + stop - first] = data.view(self.dtype)
    return out

  def _mapped(self, shard: Shard, first: int, stop: int) -> np.ndarray:
    """Ids of a shard out of its map, its blocks checked."""
    assert isinstance(self._folder, LocalFolder)
    size = shard.itemsize
    if shard.mapped is None or shard.checked.find(0, first * size // BLOCK, -(-stop * size // BLOCK)) >= 0:
      list(self._bytes([(shard, first * size, stop * size)]))
      if shard.mapped is None:
        shard.mapped = self._folder.mapped(shard.name)[:shard.ids].view(self.dtype)
    return shard.mapped[first:stop]

  def texts(self, first: int, stop: int) -> Iterator[str]:
    """The texts of documents first to stop - 1."""
    tokenizer, places = self.tokenizer(), self.starts(first, stop)
    for start, end in zip(places, places[1:]):
      yield tokenizer.decode(self.read([start], [end - start]).tolist())

  def _pieces(self, starts: np.ndarray, counts: np.ndarray) -> Iterator[tuple[Shard, int, int, int]]:
    """The stretches of shards that ranges of the circle consist of, each with its place in what is read."""
    at = 0
    for number, start, count in zip(np.searchsorted(self.index['tokens'], starts, 'right').tolist(), starts.tolist(), counts.tolist()):
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
    """Places [stop - first + 1] of documents first to stop - 1, and the end of the last of them, as int64."""
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
      here = self.index[number]
      self._shards[number] = Shard(shard_name(number), tokens, documents, int(here['tokens']) - tokens,
                                   int(here['documents']) - documents, self.dtype.itemsize)
    return self._shards[number]

  def _bytes(self, wanted: Sequence[tuple[Shard, int, int]]) -> Iterator[np.ndarray]:
    """Stretches of shards' bytes, the blocks that hold them checked."""
    spans = [shard.blocks(first, stop) for shard, first, stop in wanted]
    unknown = list({shard.name: shard for shard, _, _ in wanted if shard.checksums is None}.values())
    for shard, sums in zip(unknown, self._folder.ranges([(shard.name, shard.sums, shard.size) for shard in unknown])):
      shard.checksums, shard.checked = sums.view('<u4'), bytearray(len(sums) // 4)
    for (shard, first, stop), span, data in zip(wanted, spans, self._folder.ranges(spans)):
      self._check(shard, span, data)
      yield data[first - span[1]:stop - span[1]]

  def _check(self, shard: Shard, span: Range, data: np.ndarray) -> None:
    first, stop = span[1] // BLOCK, -(-span[2] // BLOCK)
    assert shard.checksums is not None
    if shard.checked.find(0, first, stop) < 0:
      return
    for block in range(first, stop):
      start = (block - first) * BLOCK
      if zlib.crc32(data[start:start + BLOCK].data) != shard.checksums[block]:
        raise self._damaged(shard.name, f'another CRC-32 from byte {block * BLOCK:,} on', 'the bytes')
      shard.checked[block] = 1

  def _damaged(self, name: str, found: str, expected: str) -> UserError:
    return UserError(f'{self.place}/{name}', found, f'{expected} as written; restore it, or prepare the store again')
