"""Own data: the SMS Spam Collection as texts to classify, as many of one class as of the other.

The file SMSSpamCollection (archive.ics.uci.edu/dataset/228) has a message per line, after its class and a tab. This writes
FOLDER/train.jsonl with 80 % of the messages, of which configs/spam.py holds out an eighth for validation, and FOLDER/test.jsonl with 20 %:

  python -m examples.spam --file=SMSSpamCollection --out=FOLDER
"""

import json
import random
from pathlib import Path

from absl import flags

from gptjax import config as configs

_FILE = flags.DEFINE_string('file', None, 'the file SMSSpamCollection', required=True)
_OUT = flags.DEFINE_string('out', None, 'folder for train.jsonl and test.jsonl', required=True)
_SEED = flags.DEFINE_integer('seed', 0, 'decides which messages are taken, and which of them are for the test')


def balanced(lines: list[str], seed: int) -> list[dict[str, str]]:
  """Messages in random order: of each class as many as of the smaller one."""
  rng = random.Random(seed)
  by_class: dict[str, list[dict[str, str]]] = {}
  for line in lines:
    label, text = line.rstrip('\n').split('\t', 1)
    by_class.setdefault(label, []).append({'text': text, 'label': label})
  count = min(map(len, by_class.values()))
  chosen = [record for label in sorted(by_class) for record in rng.sample(by_class[label], count)]
  rng.shuffle(chosen)
  return chosen


def main(_) -> None:
  with open(_FILE.value, encoding='utf-8') as file:
    records = balanced(list(file), _SEED.value)
  train, out = len(records) * 8 // 10, Path(_OUT.value)
  out.mkdir(parents=True, exist_ok=True)
  for name, some in (('train', records[:train]), ('test', records[train:])):
    (out / f'{name}.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in some), encoding='utf-8')
    print(f'{out}/{name}.jsonl: {len(some)} messages')


if __name__ == '__main__':
  configs.run(main, needs_config=False)
