"""Training of tokenizers: SentencePiece learns from the words of documents and their counts."""

import collections
import io
import itertools
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from gptjax.config import TokenizerConfig, UserError
from gptjax.data.progress import announce
from gptjax.data.sources.source import Document
from gptjax.data.tokenizers.subwords import SentencePieceTokenizer, Words, word_pattern
from gptjax.data.tokenizers.tokenizer import ALPHABET, SPECIALS, ByteTokenizer, CharTokenizer, Tokenizer, to_alphabet, utf8


def train_tokenizer(
    config: TokenizerConfig, documents: Iterable[Document], *, digits: int = 1, symbols: Sequence[str] = ()) -> Tokenizer:
  """Trains a tokenizer; the same documents give the same one.

  'chars' needs every document that will be encoded, validation included; the other kinds can encode any text, because every
  byte is a piece, and learn well from a `sample`. Documents are read once.

  Args:
    config: kind and vocabulary size; its path is ignored.
    documents: texts to learn from.
    digits: maximum number of digits in a piece of 'bpe' or 'unigram'; 1: single digits, 3: as in GPT-4.
    symbols: texts that 'bpe' and 'unigram' always encode as one id.

  Raises:
    UserError: the vocabulary is larger than the documents allow or too small for bytes and symbols, a text is not valid
      Unicode, or digits or symbols are invalid.
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
    raise UserError('digits', digits, '1 or more digits per piece')
  for symbol in symbols:
    if len(symbol.encode(errors='replace')) < 2 or symbols.count(symbol) > 1:
      raise UserError('symbol', symbol, 'distinct texts of two or more bytes')
    if symbol in ('<pad>', '<s>', '</s>', '<unk>'):
      raise UserError('symbol', symbol, "texts other than SentencePiece's own special tokens")
  return Words(word_pattern(digits), symbols)


def _train_sentencepiece(config: TokenizerConfig, documents: Iterable[Document], words: Words) -> Tokenizer:
  smallest = SPECIALS + len(ALPHABET) + len(words.symbols)
  if config.vocab_size < smallest:
    raise UserError('data.tokenizer.vocab_size', config.vocab_size, f'{smallest} or more: special ids, 256 bytes and symbols')
  counts: collections.Counter[str] = collections.Counter()
  for document in documents:
    utf8(document.text, document.name)
    counts.update(words.split(document.text))
  for symbol in words.symbols:
    del counts[symbol]  # a Counter raises no KeyError
  announce(f'training the {config.kind} tokenizer with {config.vocab_size:,} ids')
  # One word and its count per line. Each byte's character occurs once, so that all are pieces.
  lines = itertools.chain((f'{byte}\t1' for byte in ALPHABET), (f'{to_alphabet(word.encode())}\t{n}' for word, n in counts.items()))
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, input_format='tsv', model_writer=model, model_type=config.kind,
        vocab_size=config.vocab_size, pad_id=Tokenizer.pad_id, bos_id=Tokenizer.bos_id, eos_id=-1, unk_id=Tokenizer.unk_id,
        user_defined_symbols=[to_alphabet(symbol.encode()) for symbol in words.symbols], character_coverage=1.0,
        normalization_rule_name='identity', add_dummy_prefix=False, split_by_unicode_script=False,
        split_by_whitespace=False, max_sentencepiece_length=32, seed_sentencepiece_size=25 * config.vocab_size,
        minloglevel=2, num_threads=8)  # fixed, because the result of unigram depends on it
  except RuntimeError as error:
    limit = re.search(r'Vocabulary size too high .* <= (\d+)', str(error))
    if not limit:
      raise
    raise UserError('data.tokenizer.vocab_size', config.vocab_size, f'at most {limit[1]} for these documents, or '
                    "data.tokenizer.kind 'chars' or 'bytes'") from None
  return SentencePieceTokenizer(config.kind, model.getvalue(), words)
