"""Trains a tokenizer on a sample of documents: python -m tools.train_tokenizer --source=PATH --out=DIR

Every byte is a piece, so that any text can be encoded. Runs use the tokenizer with --config.data.tokenizer.path=DIR.
"""

import pathlib
from collections.abc import Iterator, Sequence

from absl import flags

from gptjax import signals
from gptjax.cache import cache_dir
from gptjax.config import LEAST_VOCABULARY, TokenizerConfig, UserError, run, unescaped
from gptjax.data.progress import announce
from gptjax.data.sources import Document, Source, is_held_out, open_source, sample
from gptjax.data.sources.selection import TRAINING_CHARACTERS
from gptjax.data.tokenizers import Gpt2Tokenizer, Tokenizer, VocabularyError, load_tokenizer, train_tokenizer
from gptjax.data.tokenizers.tokenizer import utf8
from gptjax.files import atomic_directory, expanded
from . import source_flags

_SCORED_BYTES = 5_000_000


class Corpus:
  """Iterates over training documents of several sources, and keeps some text to score the tokenizer on.

  Args:
    sources: of documents.
    budgets: characters to sample from each.
    held_out: fraction of the documents that are held out.
  """

  def __init__(self, sources: Sequence[Source], budgets: Sequence[int], held_out: float):
    self.sources, self.budgets, self.held_out = sources, budgets, held_out
    # By whether they are held out: texts to score on, and the number of bytes that may still be added.
    self._texts: dict[bool, list[str]] = {True: [], False: []}
    self._left = {True: _SCORED_BYTES, False: _SCORED_BYTES}

  def __iter__(self) -> Iterator[Document]:
    for source, budget in zip(self.sources, self.budgets, strict=True):
      amount = f'about {budget:,} characters of it' if budget < source.size else 'all of it'
      announce(f'reading {source.description}: {amount}')
      for document in sample(source, budget):
        held_out = is_held_out(document.name, self.held_out)
        self._keep(document, held_out)
        if not held_out:
          yield document
    if not self._texts[False]:
      raise UserError('--source', [source.description for source in self.sources], 'sources with text to train on')

  def _keep(self, document: Document, held_out: bool) -> None:
    size = len(utf8(document.text, document.name))
    if size <= self._left[held_out]:
      self._left[held_out] -= size
      self._texts[held_out].append(document.text)

  def scored(self) -> tuple[str, list[str]]:
    """A description of the texts to score on, and the texts: held-out documents, if there are any."""
    texts = self._texts[True] or self._texts[False]
    origin = 'held-out documents' if self._texts[True] else 'training text, since no document is held out'
    return f'{sum(len(text.encode()) for text in texts):,} bytes of {origin}', texts


def table(tokenizers: dict[str, Tokenizer], texts: Sequence[str]) -> str:
  """A table of vocabulary size and bytes per token of tokenizers, by name, on the same texts."""
  size = sum(len(text.encode()) for text in texts)
  width = max(map(len, tokenizers))
  lines = [f'{"tokenizer":{width}}  {"ids":>7}  bytes per token']
  for name, tokenizer in tokenizers.items():
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    lines.append(f'{name:{width}}  {tokenizer.vocab_size:>7,}  {size / max(tokens, 1):15.3f}')
  return '\n'.join(lines)


def budgets(weights: Sequence[str], sources: int, characters: int) -> list[int]:
  """Characters to sample from each source, in proportion to its weight; equal if there are no weights.

  Raises:
    UserError: the weights are not one number above 0 per source.
  """
  try:
    numbers = [float(weight) for weight in weights] or [1.0] * sources
    if len(numbers) != sources or not all(0 < number < float('inf') for number in numbers):
      raise ValueError
  except ValueError:
    raise UserError('--weights', ','.join(weights), f'{sources} numbers above 0, one for each --source') from None
  return [max(round(characters * number / sum(numbers)), 1) for number in numbers]


def _existing(out: pathlib.Path) -> Tokenizer | None:
  """The tokenizer in the output folder, or None; other contents are an error."""
  if not out.exists():
    return None
  try:
    found = load_tokenizer(out)
    announce(f'{out} exists; the new tokenizer is only compared with it')
    return found
  except UserError:
    raise UserError('--out', str(out), 'a new folder, or one of the same tokenizer') from None


def main(_: None) -> None:
  """Trains a tokenizer on --source and writes it to --out."""
  signals.watch()
  values = flags.FLAGS
  if '://' in values.out:
    raise UserError('--out', values.out, 'a folder on this machine')
  out = expanded(values.out)
  vocab_size = -(-values.vocab_size // values.multiple) * values.multiple
  config = TokenizerConfig(kind=values.kind, vocab_size=vocab_size)
  chosen = source_flags.sources()
  characters = budgets(values.weights, len(chosen), values.characters)
  existing = _existing(out)
  gpt2 = {f'gpt2 ({values.gpt2_bpe})': Gpt2Tokenizer(expanded(values.gpt2_bpe))} if values.gpt2_bpe else {}
  corpus = Corpus([open_source(source, cache_dir()) for source in chosen], characters, values.held_out)
  with atomic_directory(out, resumes=False) as folder:  # made first: a tokenizer that cannot be written need not be trained
    try:
      tokenizer = train_tokenizer(config, corpus, digits=values.digits, symbols=[*map(unescaped, values.symbol)])
    except VocabularyError as error:
      raise VocabularyError(vocab_size, error.least, error.most, values.multiple, otherwise='') from None
    if folder:
      tokenizer.save(folder)
    elif existing and existing.sha256 != tokenizer.sha256:
      raise UserError('--out', str(out), 'a new folder; this one has another tokenizer')
  description, texts = corpus.scored()
  print(description)
  print(table({f'{tokenizer.kind} ({out})': tokenizer, **gpt2}, texts))
  print(out)


if __name__ == '__main__':
  flags.DEFINE_list('weights', [], 'relative weight of each source; equal by default')
  flags.DEFINE_string('out', None, 'folder to write', required=True)
  flags.DEFINE_enum('kind', 'bpe', ['bpe', 'unigram'], 'model that SentencePiece learns; with both, every byte is a piece')
  flags.DEFINE_integer('vocab_size', 32_000, 'number of ids, including 3 special ids and 256 bytes', lower_bound=LEAST_VOCABULARY)
  flags.DEFINE_integer('multiple', 64, 'vocab_size is rounded up to a multiple of it', lower_bound=1)
  flags.DEFINE_integer('digits', 1, 'maximum number of digits in a piece; 1: single digits', lower_bound=1)
  flags.DEFINE_multi_string('symbol', [], r"text that is always one id, such as '<|user|>' or '\n\n'; may be repeated")
  flags.DEFINE_integer('characters', TRAINING_CHARACTERS, 'approximate number of characters to learn from', lower_bound=1)
  flags.DEFINE_string('gpt2_bpe', '', "folder of GPT-2's encoder.json and vocab.bpe, for comparison")
  flags.DEFINE_float('held_out', 0.01, 'fraction of documents that are held out for scoring', 0, 0.9)
  run(main, needs_config=False)
