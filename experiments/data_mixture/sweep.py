"""Shares of books beside code, and passes over less and less code: 30 runs of equal length.

python -m gptjax.sweep --sweep=experiments/data_mixture/sweep.py --out=sweeps/data_mixture --workers=2
"""

from collections.abc import Iterator

from gptjax.sweeps import Point, Points, Sweep, chain, product, seeds, values

SHARES = 0.0, 0.25, 0.5, 0.75, 1.0
"""of the tokens that come from books"""
PASSES = 1, 2, 4, 8, 16
"""over the same text, in a run of ALL tokens"""
ALL = 400 * 8 * 128
"""tokens of a run of the recipe"""
SEEDS = 3
PIECE = 512
"""tokens of a piece of text, its start included: 4 rows of the small recipe, and small beside the 25,600 tokens of 16 passes"""
STORES = 'stores/mixture'
Mixture = list[Point]
"""A value of data.train."""


def mixture(folder: str, books: float) -> Mixture:
  """Code, and a share of books, from the stores in a folder."""
  parts = {'code': 1 - books, 'books': books}
  return [{'store': f'{folder}/{name}', 'weight': weight} for name, weight in parts.items() if weight]


def repeated(folder: str, passes: int, seed: int) -> Mixture:
  """The text that a seed chooses to be read this many times."""
  return [{'store': f'{folder}/code_{passes}_{seed}'}]


def points(folder: str) -> Points:
  """Every share with every seed, and every number of passes over the text of each seed."""
  shares = product(seeds(SEEDS), values('data.train', *(mixture(folder, share) for share in SHARES)))
  repeats = [{'seed': seed, 'data.train': repeated(folder, passes, seed)} for seed in range(SEEDS) for passes in PASSES]
  return chain(shares, repeats)


def pieces(text: str) -> Iterator[str]:
  """All pieces of a text that have a byte per character."""
  for start in range(0, len(text) - PIECE + 2, PIECE - 1):
    if (piece := text[start:start + PIECE - 1]).isascii():
      yield piece


def valid(folder: str) -> Mixture:
  """The value of data.valid: what is held out of both sides."""
  return [{'name': name, 'store': f'{folder}/{name}_valid'} for name in ('code', 'books')]


def sweep(folder: str) -> Sweep:
  """The small version over the stores in a folder."""
  return Sweep('configs/experiment.py', points(folder), overrides={'data.valid': valid(folder)})


def get_sweep() -> Sweep:
  return sweep(STORES)
