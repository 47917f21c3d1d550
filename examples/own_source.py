"""A data source of your own: documents that a function makes, sums of numbers below 100.

  python -m gptjax.train --config=examples/own_source.py --workdir=runs/own_source
  python -m gptjax.generate --workdir=runs/own_source --prompt='7 + 8 =' --max_tokens=10
"""

import hashlib

import gptjax
from gptjax.data import Document, Source
from gptjax.data.sources import Part


class Sums(Source):
  """One document per sum. Parts are read independently, by several processes if there is much text."""

  description = 'sums of numbers below 100'
  skip = 0.0  # fraction of malformed records to tolerate

  def __init__(self, config):
    self.size = sum(part.size for part in self.parts())  # `config` has the fields data.source.*

  def parts(self):
    """The ranges of records, in order."""
    for a in range(100):
      yield Part(self.description, '', start=100 * a, stop=100 * (a + 1), size=1200)

  def read(self, part):
    """The documents of a part; each one has a name of its own, by which validation is held out."""
    for number in range(part.start, part.stop):
      a, b = divmod(number, 100)
      yield Document(f'{a}+{b}', f'{a} + {b} = {a + b}\n')

  def fingerprint(self):
    """Changes when the documents do, since prepared data is cached under it."""
    return hashlib.sha256(b'sums, version 1').hexdigest()


def get_config():
  return gptjax.load_config('configs/experiment.py', {'data.source.path': 'python:examples.own_source:Sums'})
