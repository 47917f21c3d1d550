"""Token stores of any shape for tests."""

import numpy as np

from gptjax.data.store import ShardWriter, TokenStore, finish_store
from gptjax.data.tokenizers import ByteTokenizer

FIRST = 10
"""The id at position 0 would be this if it were not a separator."""


class ManyIds(ByteTokenizer):
  """A tokenizer with as many ids as are asked for."""

  def __init__(self, vocab_size):
    super().__init__()
    self.sha256 = ByteTokenizer().sha256  # it is saved as one of bytes
    self.pieces += (b'',) * max(0, vocab_size - len(self.pieces))


def make_store(folder, lengths, shard_documents=None, vocab_size=2**16 + 1, draw=None):
  """Writes a store of documents with `lengths` ids each, including the separator, and 3 bytes for each other id.

  The id at a position is FIRST + position, so that every id is known, or comes from `draw`, a function of the number of ids.
  """
  folder.mkdir(parents=True)
  tokenizer = ManyIds(vocab_size)
  lengths, shards, place = np.asarray(lengths), [], 0
  for first in range(0, len(lengths), shard_documents or len(lengths)):
    part = lengths[first:first + (shard_documents or len(lengths))]
    ids = np.asarray(draw(part.sum()) if draw else np.arange(FIRST + place, FIRST + place + part.sum()))
    ids = ids.astype('<u4' if vocab_size > 2**16 else '<u2')
    ids[np.cumsum(part) - part] = tokenizer.bos_id
    writer = ShardWriter(folder, len(shards), ids.dtype)
    for piece, length in zip(np.split(ids, np.cumsum(part)[:-1]), part):
      writer.append([piece.tobytes()], int(3 * (length - 1)))
    shards.append(writer.close())
    place += part.sum()
  finish_store(folder, tokenizer, shards, {})
  return TokenStore.open(folder)


def texts(store):
  """The decoded documents of a store."""
  tokenizer, starts = store.tokenizer(), store.starts(0, store.documents)
  return [tokenizer.decode(store.read([start], [stop - start]).tolist()) for start, stop in zip(starts, starts[1:])]


def stream(store):
  """All ids of a store."""
  return store.read([0], [store.tokens])
