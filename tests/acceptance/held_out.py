"""The bar of what a folder of one's own text holds out for validation."""

import random
import re
from pathlib import Path

from gptjax.config import DataConfig, SourceConfig, TokenizerConfig
from gptjax.data import TokenStore, prepare
from tests.acceptance.record import Result, bar, python

_DRAWS = 500
_FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.5)


def _written(folder: Path, rng: random.Random) -> int:
  """Writes 1 to 50 files of unequal size, most of 1 to 20 kB; returns their bytes."""
  folder.mkdir()
  sizes = [int(rng.lognormvariate(8.5, rng.choice([0.5, 1, 2]))) + 100 for _ in range(rng.randint(1, 50))]
  for size in sizes:
    (folder / f'{rng.getrandbits(40):010x}.txt').write_text(''.join(rng.choices('abcdefgh \n', k=size)))
  return sum(sizes)


@bar
def held_out(folder: Path) -> Result:
  """Draws folders, and compares what a run holds out with the fraction, with what its header says, and with stores of prepare_data."""
  rng = random.Random(0)
  factors, said, same, commands = [], 0, 0, 0
  for draw in range(_DRAWS):
    place, fraction = folder / f'{draw}', rng.choice(_FRACTIONS)
    total = _written(place, rng)
    data = prepare(DataConfig(SourceConfig(str(place)), fraction, TokenizerConfig('bytes'), context=1), folder / 'cache')
    train, valid = data.layouts[0].store, data.valid['valid']
    if train.bytes + valid.bytes != total:
      raise RuntimeError(f'{place}: {total} bytes of text, but {train.bytes} and {valid.bytes} in the stores')
    factors.append(valid.bytes / total / fraction)
    words = re.search(r'held out: ([\d.]+)% of the text', data.description)
    said += bool(words and abs(float(words[1]) / 100 - valid.bytes / total) < 0.01 * valid.bytes / total)
    if draw % 50 == 0:
      for side, store in (('train', train), ('valid', valid)):
        out = folder / f'{draw}_{side}'
        python('tools.prepare_data', f'--source={place}', '--tokenizer=bytes', f'--side={side}', f'--valid_fraction={fraction}',
               f'--out={out}', '--processes=2')
        same, commands = same + (TokenStore.open(out).sha256 == store.sha256), commands + 1
  figure = (f'{len(factors)} folders: {min(factors):.2f} to {max(factors):.2f} times the fraction; said {said}; '
            f'stores of prepare_data equal {same} of {commands}')
  return Result('500 folders of 1 to 50 files of unequal size, fractions 0.02 to 0.5: held out between 0.5 and 1.5 times the fraction; '
                'the header says how much; prepare_data splits alike', figure,
                0.5 <= min(factors) and max(factors) <= 1.5 and said == len(factors) and same == commands,
                'python -m tests.acceptance --only=held_out')
