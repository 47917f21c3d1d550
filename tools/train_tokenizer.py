"""`python -m tools.train_tokenizer --source=PATH --out=DIR`: a tokenizer for many runs, trained on a sample of documents.

Every byte is a piece, so it has ids for any text. A run takes it with --config.data.tokenizer.path=DIR.
"""

import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from absl import flags

from gptjax.cache import cache_dir
from gptjax.config import TokenizerConfig, UserError, run
from gptjax.data.progress import announce
from gptjax.data.sampling import TRAINING_CHARACTERS, sample
from gptjax.data.sources import Document, Source, is_held_out, open_source
from gptjax.data.tokenizers import Gpt2Tokenizer, Tokenizer, load_tokenizer, train_tokenizer
from gptjax.data.tokenizers.tokenizer import utf8
from gptjax.files import expanded
from tools import source_flags

_SCORED_BYTES = 5_000_000


class Corpus:
  """Documents to train on, out of several sources; text to score on is kept aside as they go by.

  Args:
    sources: where documents are.
    budgets: characters to take of each.
    share: of the documents that are held out.
  """

  def __init__(self, sources: Sequence[Source], budgets: Sequence[int], share: float):
    self.sources, self.budgets, self.share = sources, budgets, share
    # By whether they are held out: texts to score on, and how many bytes more of them are wanted.
    self._texts: dict[bool, list[str]] = {True: [], False: []}
    self._left = {True: _SCORED_BYTES, False: _SCORED_BYTES}

  def __iter__(self) -> Iterator[Document]:
    for source, budget in zip(self.sources, self.budgets, strict=True):
      share = f'about {budget:,} characters of it' if budget < source.size else 'all of it'
      announce(f'reading {source.description}: {share}')
      for document in sample(source, budget):
        out = is_held_out(document.name, self.share)
        self._keep(document, out)
        if not out:
          yield document
    if not self._texts[False]:
      raise UserError('--source', [source.description for source in self.sources], 'sources with text to train on')

  def _keep(self, document: Document, out: bool) -> None:
    size = len(utf8(document.text, document.name))
    if size <= self._left[out]:
      self._left[out] -= size
      self._texts[out].append(document.text)

  def scored(self) -> tuple[str, list[str]]:
    """What the tokenizer is scored on, in words, and the texts: documents that are held out, where there are any."""
    texts = self._texts[True] or self._texts[False]
    words = 'held-out documents' if self._texts[True] else 'text that it was trained on, since none of it is held out'
    return f'{sum(len(text.encode()) for text in texts):,} bytes of {words}', texts


def table(tokenizers: dict[str, Tokenizer], texts: Sequence[str]) -> str:
  """Ids and bytes per token of tokenizers, by the name of each, on the same texts."""
  size = sum(len(text.encode()) for text in texts)
  width = max(map(len, tokenizers))
  lines = [f'{"tokenizer":{width}}  {"ids":>7}  bytes per token']
  for name, tokenizer in tokenizers.items():
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    lines.append(f'{name:{width}}  {tokenizer.vocab_size:>7,}  {size / max(tokens, 1):15.3f}')
  return '\n'.join(lines)


def budgets(weights: Sequence[str], sources: int, characters: int) -> list[int]:
  """Characters of each source, in proportion to its weight; alike where there are no weights.

  Raises:
    UserError: the weights are not as many numbers above 0 as there are sources.
  """
  try:
    numbers = [float(weight) for weight in weights] or [1.0] * sources
    if len(numbers) != sources or not all(0 < number < float('inf') for number in numbers):
      raise ValueError
  except ValueError:
    raise UserError('--weights', ','.join(weights), f'{sources} numbers above 0, one for each --source') from None
  return [max(round(characters * number / sum(numbers)), 1) for number in numbers]


def _already(out: pathlib.Path) -> Tokenizer | None:
  """The tokenizer that lies where the new one should, or None; anything else there is a mistake."""
  if '://' in str(flags.FLAGS.out):
    raise UserError('--out', flags.FLAGS.out, 'a folder on this machine')
  if not out.exists():
    return None
  try:
    found = load_tokenizer(out)
    announce(f'{out} is there; what is trained now is only compared with it')
    return found
  except UserError:
    raise UserError('--out', str(out), 'a folder that there is not yet, or one of the same tokenizer') from None


def _save(tokenizer: Tokenizer, out: pathlib.Path, already: Tokenizer | None) -> None:
  if already:
    if already.sha256 != tokenizer.sha256:
      raise UserError('--out', str(out), 'a folder that there is not yet; another tokenizer lies in this one')
    return
  out.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}.') as folder:  # whole, or not there
    tokenizer.save(pathlib.Path(folder, 'whole'))
    pathlib.Path(folder, 'whole').rename(out)


def main(_: None) -> None:
  """Trains a tokenizer on --source and writes it to --out."""
  values = flags.FLAGS
  out = expanded(values.out)
  vocab_size = -(-values.vocab_size // values.multiple) * values.multiple
  config = TokenizerConfig(kind=values.kind, vocab_size=vocab_size)
  chosen = source_flags.sources()
  characters = budgets(values.weights, len(chosen), values.characters)
  already = _already(out)
  gpt2 = {f'gpt2 ({values.gpt2_bpe})': Gpt2Tokenizer(expanded(values.gpt2_bpe))} if values.gpt2_bpe else {}
  corpus = Corpus([open_source(source, cache_dir()) for source in chosen], characters, values.held_out)
  tokenizer = train_tokenizer(config, corpus, digits=values.digits, symbols=values.symbol)
  _save(tokenizer, out, already)
  words, texts = corpus.scored()
  print(words)
  print(table({f'{tokenizer.kind} ({out})': tokenizer, **gpt2}, texts))
  print(out)


if __name__ == '__main__':
  flags.DEFINE_list('weights', [], 'share of each source, relative to the others; alike unless given')
  flags.DEFINE_string('out', None, 'folder to write', required=True)
  flags.DEFINE_enum('kind', 'bpe', ['bpe', 'unigram'], 'how SentencePiece learns; every byte is a piece of both')
  flags.DEFINE_integer('vocab_size', 32_000, 'ids, 3 special ones and 256 bytes included', lower_bound=300)
  flags.DEFINE_integer('multiple', 64, 'what vocab_size is rounded up to a multiple of', lower_bound=1)
  flags.DEFINE_integer('digits', 1, 'longest run of digits that a piece may hold; 1: each digit alone', lower_bound=1)
  flags.DEFINE_multi_string('symbol', [], "text that is one id wherever it stands, as '<|user|>'; once for each")
  flags.DEFINE_integer('characters', TRAINING_CHARACTERS, 'characters to learn from, about', lower_bound=1)
  flags.DEFINE_string('gpt2_bpe', '', "folder of GPT-2's encoder.json and vocab.bpe, to compare with")
  flags.DEFINE_float('held_out', 0.01, 'share of documents that are scored on and not learned from', 0, 0.9)
  run(main, needs_config=False)
