"""Pairs of answers to sums, as a TFDS dataset: the right one, and one with a mistake in carrying.

Use it as data.source.path='tfds:examples.sum_pairs:SumPairs', with data.source.prompt=prompt, chosen=chosen and rejected=rejected.
"""

import random
from collections.abc import Iterator

import tensorflow_datasets as tfds

from examples.sums import QUESTIONS, worked


class SumPairs(tfds.core.GeneratorBasedBuilder):
  """2,000 of the 10,000 sums of numbers below 100."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    fields = dict.fromkeys(('prompt', 'chosen', 'rejected'), tfds.features.Text())
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

  def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
    rng = random.Random(2)
    for number, at in enumerate(rng.sample(range(10_000), 2000)):
      a, b = divmod(at, 100)
      yield number, {'prompt': rng.choice(QUESTIONS).format(a=a, b=b), 'chosen': worked(a, b), 'rejected': worked(a, b, right=False)}
