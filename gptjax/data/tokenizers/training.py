"""Training a tokenizer: documents become words with their counts, and SentencePiece learns from those."""

import collections
import io
import itertools
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from gptjax.config import TokenizerConfig, UserError
from gptjax.data.progress import announce
from gptjax.data.sources.source import Document
from gptjax.data.tokenizers.subwords import SentencePieceTokenizer, Words, words_of
from gptjax.data.tokenizers.tokenizer import ALPHABET, SPECIALS, ByteTokenizer, CharTokenizer, Tokenizer, in_alphabet, utf8

def train_tokenizer(
    config: TokenizerConfig, documents: Iterable[Document], *, digits: int = 1, symbols: Sequence[str] = ()) -> Tokenizer:
  """Makes a tokenizer from documents, the same one from the same documents every time.

  Characters need every document that will ever be encoded, validation included; the other kinds encode any text, since
  every byte is a piece of theirs, and learn well from a `sample`. The documents are read once.

  Args:
    config: kind and count of ids; its path does not matter here.
    documents: texts to learn from.
    digits: longest run of digits that a piece of SentencePiece's may hold; 1: each digit is its own piece, 3: as GPT-4.
    symbols: texts that SentencePiece makes one id each, wherever they stand.

  Raises:
    UserError: the documents do not have as many different pieces as the config asks for, or text that UTF-8 cannot write;
      fewer ids than bytes and symbols; no digits; a symbol twice or of fewer than two bytes.
  """
  match config.kind:
    case 'bytes':
      return ByteTokenizer()
    case 'chars':
      characters: set[str] = set()
      for document in documents:
        characters.update(document.text)
      return CharTokenizer(''.join(characters))
    case 'bpe' | 'unigram':
      return _train_sentencepiece(config, documents, _words(digits, symbols))


def _words(digits: int, symbols: Sequence[str]) -> Words:
  if digits < 1:
    raise UserError('digits', digits, '1 or more digits a piece')
  for symbol in symbols:
    if len(symbol.encode(errors='replace')) < 2 or symbols.count(symbol) > 1:
      raise UserError('symbol', symbol, 'texts of two bytes or more, each one once')
    if symbol in ('<pad>', '<s>', '</s>', '<unk>'):
      raise UserError('symbol', symbol, "texts other than SentencePiece's own special ones")
  return Words(words_of(digits), symbols)


def _train_sentencepiece(config: TokenizerConfig, documents: Iterable[Document], words: Words) -> Tokenizer:
  least = SPECIALS + len(ALPHABET) + len(words.symbols)
  if config.vocab_size < least:
    raise UserError('data.tokenizer.vocab_size', config.vocab_size, f'{least} or more: the special ids, 256 bytes and symbols')
  counts: collections.Counter[str] = collections.Counter()
  for document in documents:
    utf8(document.text, document.name)
    counts.update(words.cut(document.text))
  for symbol in words.symbols:
    del counts[symbol]  # a Counter has no KeyError
  announce(f'training the {config.kind} tokenizer with {config.vocab_size:,} ids')
  # A line a word, with its count: each byte's character once, so that it becomes a piece whatever the documents.
  lines = itertools.chain((f'{byte}\t1' for byte in ALPHABET), (f'{in_alphabet(word)}\t{n}' for word, n in counts.items()))
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, input_format='tsv', model_writer=model, model_type=config.kind,
        vocab_size=config.vocab_size, pad_id=Tokenizer.pad_id, bos_id=Tokenizer.bos_id, eos_id=-1,
        unk_id=Tokenizer.unk_id, user_defined_symbols=list(map(in_alphabet, words.symbols)), character_coverage=1.0,
        normalization_rule_name='identity', add_dummy_prefix=False, split_by_unicode_script=False,
        split_by_whitespace=False, max_sentencepiece_length=32, seed_sentencepiece_size=25 * config.vocab_size,
        minloglevel=2, num_threads=8)  # a number of ours, not the machine's: unigram's result depends on it
  except RuntimeError as error:
    highest = re.search(r'Vocabulary size too high .* <= (\d+)', str(error))
    if not highest:
      raise
    raise UserError('data.tokenizer.vocab_size', config.vocab_size, f'at most {highest[1]} for these documents, or '
                    "data.tokenizer.kind 'chars' or 'bytes'") from None
  return SentencePieceTokenizer(config.kind, model.getvalue(), words)
