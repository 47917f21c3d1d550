"""An own data source: conversations about sums, as a TFDS dataset. Use it as data.source.path='tfds:examples.sums:Sums'.

TFDS prepares it once, in ~/tensorflow_datasets or $TFDS_DATA_DIR. A record has `messages`, which data.source.messages names.
"""

import random
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

QUESTIONS = ('What is {a} + {b}?', 'Add {a} and {b}.', 'I have {a} and get {b} more. How many are these?', 'Please tell me {a} plus {b}')


def worked(a: int, b: int, *, right: bool = True) -> str:
  """The answer with its working, digit by digit from the right: a small model learns that much sooner than the result alone.

  A wrong one forgets to carry the one, or carries one that is not there.
  """
  ones = a % 10 + b % 10
  carry = (ones > 9) == right
  tens = a // 10 + b // 10 + carry
  return f'{a % 10} + {b % 10} = {ones}, {a // 10} + {b // 10}{" + 1" * carry} = {tens}: {10 * tens + ones % 10}.'


class Sums(tfds.core.GeneratorBasedBuilder):
  """Two of the 10,000 sums of numbers below 100 per conversation."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    message = {'role': tfds.features.Text(), 'content': tfds.features.Text()}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({'messages': tfds.features.Sequence(message)}))

  def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(pairs)
    return {'train': self._generate_examples(pairs[:9000]), 'test': self._generate_examples(pairs[9000:])}  # no sum is in both

  def _generate_examples(self, pairs: list[tuple[int, int]]) -> Iterator[tuple[int, dict[str, Any]]]:
    rng = random.Random(1)
    for number in range(0, len(pairs), 2):
      messages = []
      for a, b in pairs[number:number + 2]:
        messages.append({'role': 'user', 'content': rng.choice(QUESTIONS).format(a=a, b=b)})
        messages.append({'role': 'assistant', 'content': worked(a, b)})
      yield number, {'messages': messages}
