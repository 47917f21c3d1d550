"""Random permutations of any range, computed one index at a time and without a table."""

import math

import numpy as np

_U64 = np.uint64
_ROUNDS = 6


def permute(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
  """Images of `indices` [n] under pseudo-random permutations of range(size), one for each key [n].

  A Feistel network over pairs of numbers below a and b permutes range(a * b), slightly more than `size`. Images outside
  range(size) are permuted again until they are inside (cycle walking; Black and Rogaway 2002, sections 4 and 5).
  """
  a = _U64(math.isqrt(size - 1) + 1)
  b = _U64(-(-size // int(a)))
  round_keys = mix(keys + np.arange(2, 2 + _ROUNDS, dtype=_U64)[:, None])
  images = _feistel(indices.astype(_U64), a, b, round_keys)
  while (outside := images >= size).any():
    images[outside] = _feistel(images[outside], a, b, round_keys[:, outside])
  return images.astype(np.int64)


def _feistel(numbers: np.ndarray, a: np.uint64, b: np.uint64, round_keys: np.ndarray) -> np.ndarray:
  left, right = np.divmod(numbers, b)
  for number in range(0, _ROUNDS, 2):
    left = (left + mix(right + round_keys[number]) % a) % a
    right = (right + mix(left + round_keys[number + 1]) % b) % b
  return left * b + right


def mix(x: np.ndarray) -> np.ndarray:
  """A bijective hash of uint64 (splitmix64's output function, Steele et al. 2014)."""
  x = x + _U64(0x9E3779B97F4A7C15)
  x = (x ^ x >> _U64(30)) * _U64(0xBF58476D1CE4E5B9)
  x = (x ^ x >> _U64(27)) * _U64(0x94D049BB133111EB)
  return x ^ x >> _U64(31)
