"""Token stores: documents tokenized once, then read from disk at random, whatever their size."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptjax.config import UserError
from gptjax.data.documents import Document
from gptjax.data.progress import progress
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import write_whole

_MANIFEST = 'manifest.json'
_TOKENS = 'tokens.bin'
_STARTS = 'starts.npy'


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
  """A stream of documents on disk, each as bos, its tokens, eos.

  Opening one reads the manifest only; tokens come from disk when they are asked for.
  """

  directory: Path
  """where it lies"""
  tokens: np.ndarray
  """[S] the stream, memory-mapped; uint16 or, for vocabularies above 65,536, uint32"""
  starts: np.ndarray
  """[documents] int64, the place of each document's bos, memory-mapped"""
  bytes: int
  """UTF-8 bytes of all documents"""
  vocab_size: int
  """ids are below this"""
  pad_id: int
  """id that fills rows up; not in the stream"""
  bos_id: int
  """id before each document"""
  eos_id: int
  """id after each document"""
  sha256: str
  """hex digest of the stream's bytes (little-endian)"""

  @property
  def documents(self) -> int:
    """Count of documents."""
    return len(self.starts)

  @property
  def targets(self) -> int:
    """Count of tokens that are predicted: all but each document's bos."""
    return len(self.tokens) - self.documents

  @staticmethod
  def open(directory: Path) -> 'TokenStore':
    """Opens what `write_store` wrote.

    Raises:
      UserError: there is no store, or its files are not of the length that the manifest says.
    """
    try:
      manifest = json.loads((directory / _MANIFEST).read_text())
      length, dtype = manifest.pop('length'), manifest.pop('dtype')
      tokens = np.memmap(directory / _TOKENS, dtype, 'r')
      starts = np.load(directory / _STARTS, mmap_mode='r')
      if len(tokens) != length:
        raise ValueError
    except (OSError, ValueError):
      raise UserError('token store', str(directory),
                      'a folder with a whole token store (remove it to rebuild)') from None
    # A plain view: numpy's memmap subclass makes every gather slower.
    return TokenStore(directory, tokens.view(np.ndarray), starts.view(np.ndarray), **manifest)


def write_store(directory: Path, tokenizer: Tokenizer, documents: Sequence[Document], title: str) -> TokenStore:
  """Tokenizes documents into a new store, one document in memory at a time.

  The manifest comes last and at once: a folder without it is no store.

  Args:
    directory: made if missing; what an interrupted call left there is overwritten.
    tokenizer: its ids fill the stream.
    documents: at least one.
    title: what the progress bar calls the work.

  Raises:
    UserError: a document has text that the tokenizer cannot encode; the error names the document and the place.
  """
  directory.mkdir(parents=True, exist_ok=True)
  dtype = np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')
  starts, length, text_bytes, digest = [], 0, 0, hashlib.sha256()
  with (directory / _TOKENS).open('wb') as file:
    for document in progress(title, documents):
      ids = tokenizer.encode(document.text, document.name)
      stream = np.empty(len(ids) + 2, dtype)
      stream[0], stream[1:-1], stream[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
      starts.append(length)
      length += len(stream)
      text_bytes += len(document.text.encode())
      digest.update(stream.data)
      file.write(stream.data)
  np.save(directory / _STARTS, np.asarray(starts, np.int64))
  manifest = {
      'length': length, 'dtype': dtype.str, 'bytes': text_bytes, 'vocab_size': tokenizer.vocab_size,
      'pad_id': tokenizer.pad_id, 'bos_id': tokenizer.bos_id, 'eos_id': tokenizer.eos_id, 'sha256': digest.hexdigest(),
  }
  write_whole(directory / _MANIFEST, json.dumps(manifest, indent=2) + '\n')
  return TokenStore.open(directory)
