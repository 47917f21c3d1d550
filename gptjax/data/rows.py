"""Rows: a store's stream cut into windows, each a pure function of its index.

All that a training run has to remember of its data is how many rows it has taken.
"""

import numpy as np

from gptjax.data.store import TokenStore

Batch = dict[str, np.ndarray]
"""Arrays of shape [B, T]: int32 tokens, targets, positions, segments; float32 mask."""

_U64 = np.uint64
_FEISTEL_ROUNDS = 6


class TrainRows:
  """An endless sequence of full rows: epoch after epoch, each cut and ordered anew.

  The stream is a circle. Epoch e cuts it at an offset of its own into ceil(S/T) windows and visits them in an order of
  its own, both drawn from a hash of (seed, e): every window once an epoch, no table to keep, any row in O(T).

  Args:
    store: the tokens.
    context: T, tokens a row.
    seed: 0 or more; another seed gives other cuts and orders.
  """

  def __init__(self, store: TokenStore, context: int, seed: int):
    self.store = store
    self.context = context
    self.seed = seed
    self.rows_per_epoch = -(-len(store.tokens) // context)

  def batch(self, first_row: int, count: int) -> Batch:
    """Rows first_row, ..., first_row + count - 1 as arrays [count, T].

    tokens and targets: ids; targets are one step ahead of tokens. positions: tokens since the later of the document's
    and the row's start. segments: 1, 2, ... by document within the row. mask: 1 where the target continues the
    document of its input, 0 where it is the next document's first token.
    """
    epochs, indices = np.divmod(np.arange(first_row, first_row + count), self.rows_per_epoch)
    keys = _mix(_mix(np.full(count, self.seed % 2**64, _U64)) + epochs.astype(_U64))
    shifts = (_mix(keys + _U64(1)) % _U64(self.context)).astype(np.int64)
    starts = shifts + permute(indices, self.rows_per_epoch, keys) * self.context
    places = (starts[:, None] + np.arange(self.context + 1)) % len(self.store.tokens)
    return _batch(self.store.tokens[places].astype(np.int32), self.store)


class EvalRows:
  """Non-overlapping windows over the stream, in order; the last one is padded.

  Every token of every document, its eos included, is a target exactly once.

  Args:
    store: the tokens.
    context: T, tokens a row.
  """

  def __init__(self, store: TokenStore, context: int):
    self.store = store
    self.context = context
    self.count = -(-(len(store.tokens) - 1) // context)
    self.bytes = store.bytes

  def batch(self, indices: np.ndarray) -> Batch:
    """Rows at `indices` [n] as arrays [n, T], laid out as TrainRows.batch does.

    Padding has token and target pad, segment 0 and mask 0. Rows from `count` on are all padding, so the last batch of
    an evaluation can be as large as the others.
    """
    places = np.asarray(indices, np.int64)[:, None] * self.context + np.arange(self.context + 1)
    inside = places < len(self.store.tokens)
    window = self.store.tokens[np.where(inside, places, 0)].astype(np.int32)
    return _batch(np.where(inside, window, self.store.pad_id), self.store)


def _batch(window: np.ndarray, store: TokenStore) -> Batch:
  """What the model and the loss need of windows [n, T+1] of the stream."""
  tokens, targets = window[:, :-1], window[:, 1:]
  # A document begins with bos and bos is nowhere else, so the tokens themselves tell the documents apart.
  begins = tokens == store.bos_id
  begins[:, 0] = True
  here = np.arange(tokens.shape[1], dtype=np.int32)
  padding = tokens == store.pad_id
  return {
      'tokens': np.ascontiguousarray(tokens),
      'targets': np.ascontiguousarray(targets),
      'positions': here - np.maximum.accumulate(np.where(begins, here, 0), axis=1),
      'segments': np.where(padding, 0, np.cumsum(begins, axis=1, dtype=np.int32)),
      'mask': ((targets != store.bos_id) & (targets != store.pad_id)).astype(np.float32),
  }


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
  """The images of `indices` [n] under pseudo-random permutations of range(size), one for each key [n].

  A Feistel network permutes the smallest 2^(2k) numbers that cover the range; whoever lands outside walks on until
  inside (cycle walking, Black and Rogaway 2002), which leaves a permutation of the range itself.
  """
  half = _U64(max(1, ((size - 1).bit_length() + 1) // 2))
  images = _feistel(indices.astype(_U64), half, keys)
  while (outside := images >= size).any():
    images[outside] = _feistel(images[outside], half, keys[outside])
  return images.astype(np.int64)


def _feistel(numbers: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
  low = (_U64(1) << half) - _U64(1)
  left, right = numbers >> half, numbers & low
  for turn in range(_FEISTEL_ROUNDS):
    left, right = right, left ^ (_mix(right + _mix(keys + _U64(2 + turn))) & low)
  return left << half | right


def _mix(x: np.ndarray) -> np.ndarray:
  """A bijective hash of uint64 (splitmix64's output function, Steele et al. 2014)."""
  x = x + _U64(0x9E3779B97F4A7C15)
  x = (x ^ x >> _U64(30)) * _U64(0xBF58476D1CE4E5B9)
  x = (x ^ x >> _U64(27)) * _U64(0x94D049BB133111EB)
  return x ^ x >> _U64(31)
