"""Writing of token stores. A shard appears only when it is complete."""

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.store import BLOCK, INDEX, MANIFEST, RECORD, TOKENIZER, VERSION, Shard, manifest_sha256, shard_name
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import sync, write_atomic


def id_dtype(vocab_size: int) -> np.dtype:
  """uint16, or uint32 for vocabularies above 65,536 ids."""
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


class ShardRecord(NamedTuple):
  """Facts about a finished shard."""

  tokens: int
  documents: int
  bytes: int
  """UTF-8 bytes of its documents"""
  sha256: str

  def size(self, dtype: np.dtype) -> int:
    """Bytes of its file."""
    return Shard('', 0, 0, self.tokens, self.documents, dtype.itemsize).size


class ShardWriter:
  """Writes shard `number` of a store to a temporary file, which `close` renames."""

  def __init__(self, directory: Path, number: int):
    self._path = directory / shard_name(number)
    self._partial = self._path.with_suffix('.partial')
    self._file = self._partial.open('wb')
    self._digest = hashlib.sha256()
    self._lengths: list[np.ndarray] = []
    self._checksums: list[int] = []
    self._incomplete = b''  # of the last block
    self.tokens = 0
    self.bytes = 0

  def append(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
    """Appends documents: all their ids, the ids of each, separators included, and the UTF-8 bytes of their texts."""
    self._write(ids.tobytes())
    self._lengths.append(lengths)
    self.tokens += len(ids)
    self.bytes += text_bytes

  def close(self) -> ShardRecord:
    """Finishes the shard and waits until it is on disk."""
    lengths = np.concatenate(self._lengths)
    self._write(bytes(-self._file.tell() % 8))
    self._write((np.cumsum(lengths) - lengths).astype('<i8').tobytes())
    if self._incomplete:
      self._checksums.append(zlib.crc32(self._incomplete))
    self._write_unchecked(np.asarray(self._checksums, '<u4').tobytes())
    self._file.flush()
    os.fsync(self._file.fileno())
    self._file.close()
    self._partial.rename(self._path)
    sync(self._path.parent)
    return ShardRecord(self.tokens, len(lengths), self.bytes, self._digest.hexdigest())

  def abort(self) -> None:
    """Discards the shard."""
    self._file.close()
    self._partial.unlink(missing_ok=True)

  def _write(self, data: bytes) -> None:
    """Writes bytes and computes the checksums of their blocks."""
    self._write_unchecked(data)
    data = self._incomplete + data
    complete = len(data) // BLOCK * BLOCK
    self._checksums += [zlib.crc32(memoryview(data)[at:at + BLOCK]) for at in range(0, complete, BLOCK)]
    self._incomplete = data[complete:]

  def _write_unchecked(self, data: bytes) -> None:
    self._file.write(data)
    self._digest.update(data)


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
    'bytes': sum(shard.bytes for shard in shards), 'shards': len(shards), 'dtype': id_dtype(tokenizer.vocab_size).str,
    'vocab_size': tokenizer.vocab_size, 'separator': tokenizer.bos_id, 'end': tokenizer.eos_id, 'tokenizer_sha256': tokenizer.sha256,
    'index_sha256': hashlib.sha256(index.tobytes()).hexdigest(), **facts,
  }
  write_atomic(directory / MANIFEST, json.dumps(manifest | {'sha256': manifest_sha256(manifest)}, indent=2) + '\n')
  sync(directory / MANIFEST)
