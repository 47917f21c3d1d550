"""Prompts with a checkable answer: sums whose digits are reversed, as JSON lines for training, validation and test.

  python -m examples.addition --out=data/addition
  python -m examples.addition --file=addition.txt --out=data/addition

A record is {"prompt": "16+75=", "completion": "19"}: the last digit of 91 comes first, so that a carry is known when it is needed. Without
a file of lines such as '16+75  _91', the pairs are drawn: 50,000 of numbers of up to three digits, none twice in either order.
"""

import json
import random
import re
from pathlib import Path

from absl import flags

from gptjax import config as configs

_FILE = flags.DEFINE_string('file', None, "file of lines such as '16+75  _91'; default: the pairs are drawn")
_OUT = flags.DEFINE_string('out', None, 'folder for train.jsonl, valid.jsonl and test.jsonl', required=True)
_HELD_OUT = flags.DEFINE_integer('held_out', 2500, 'sums in each of valid.jsonl and test.jsonl', lower_bound=1)


def pairs_in(file: Path) -> list[tuple[int, int]]:
  """The operands of each line."""
  return [(int(a), int(b)) for a, b in re.findall(r'^(\d+)\+(\d+)', file.read_text(), re.MULTILINE)]


def drawn_pairs(count: int, rng: random.Random) -> list[tuple[int, int]]:
  """Operands of one to three digits, those of three more often."""
  number = lambda: rng.randrange(10 ** rng.choice((1, 2, 3, 3)))
  found: dict[tuple[int, int], tuple[int, int]] = {}
  while len(found) < count:
    a, b = number(), number()
    found.setdefault((min(a, b), max(a, b)), (a, b))
  return [*found.values()]


def main(_) -> None:
  rng, size, out = random.Random(0), _HELD_OUT.value, Path(_OUT.value)
  pairs = pairs_in(Path(_FILE.value)) if _FILE.value else drawn_pairs(50_000, rng)
  rng.shuffle(pairs)
  out.mkdir(parents=True, exist_ok=True)
  for name, part in (('valid', pairs[:size]), ('test', pairs[size:2 * size]), ('train', pairs[2 * size:])):
    lines = [json.dumps({'prompt': f'{a}+{b}=', 'completion': str(a + b)[::-1]}) for a, b in part]
    (out / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
    print(f'{name}.jsonl: {len(lines):,} sums')


if __name__ == '__main__':
  configs.run(main, needs_config=False)
