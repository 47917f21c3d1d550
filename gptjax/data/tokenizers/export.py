"""Tokenizers of ours as Hugging Face's tokenizer.json and tokenizer_config.json, which transformers opens."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Description = dict[str, Any]
"""What a tokenizer.json says."""

SPECIALS = {'pad_token': '<pad>', 'bos_token': '<s>', 'eos_token': '<s>', 'unk_token': '<unk>'}
"""Names of ids 0, 1 and 2; SentencePiece's own, so that no piece that it learned has one of them."""

_NAMES = ['<pad>', '<s>', '<unk>']
_BYTES = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
_NEVER = -1e6  # a score that no path through a lattice is worth

_SPACE = '\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'
_CLASSES = {
  r'[^\w\n]': r'[^\p{L}\p{N}_' '\n]', r'[^\W\d]': r'[\p{L}\p{Nl}\p{No}_]', r'[^\w\s]': rf'[^\p{{L}}\p{{N}}_{_SPACE}]',
  r'\d': r'\p{Nd}', r'\s': f'[{_SPACE}]', r'\S': f'[^{_SPACE}]'}
"""Python's classes of characters for Oniguruma, whose own have combining marks in `\\w` and no U+001C to U+001F in `\\s`."""


def write_tokenizer(directory: Path, description: Description, specials: Mapping[str, str] | None = None) -> None:
  """Writes tokenizer.json and tokenizer_config.json.

  Args:
    directory: made if need be.
    description: what tokenizer.json says.
    specials: the text of bos_token and so on; None: SPECIALS.
  """
  directory.mkdir(parents=True, exist_ok=True)
  # Text that looks like a special token is text in transformers then, too.
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, 'split_special_tokens': True}
  config |= SPECIALS if specials is None else specials
  for name, content in (('tokenizer.json', description), ('tokenizer_config.json', config)):
    (directory / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + '\n', encoding='utf-8', newline='')


def bytes_alone(alphabet: str) -> Description:
  """Each byte an id; `alphabet` [256] is the character that stands for each."""
  return _whole(_bpe([*_NAMES, *alphabet], []), _BYTES, _BYTES)


def characters_alone(characters: str) -> Description:
  """Each of some characters an id. Other characters become the unknown id there; our own tokenizer refuses them."""
  return _whole(_bpe([*_NAMES, *characters], [], '<unk>'), None, {'type': 'Fuse'})


def gpt2(vocab: Mapping[str, int], merges: Iterable[Sequence[str]], separator: str) -> Description:
  """GPT-2's: its words and its merges."""
  return _whole(_bpe(vocab, merges), _BYTES | {'use_regex': True}, _BYTES, [(vocab[separator], separator, True)])


def subwords(kind: str, scores: Sequence[tuple[str, float]], words: str, symbols: Sequence[str]) -> Description:
  """What SentencePiece learned of words.

  Ids are equal up to two limits. Letters that Unicode got after the version that Python or the `tokenizers` package has may be
  signs for the other. And of unigram paths that are equally likely, such as two runs of spaces in either order, either may
  be taken, since SentencePiece compares sums in float32: in 549 of 841,630 words of Python's standard library, of 700 ids.

  Args:
    kind: 'bpe' or 'unigram'.
    scores: (piece, score) in the order of ids, the special ids left out, `symbols` first.
    words: Python's regular expression of a word.
    symbols: texts that are ids wherever they stand.
  """
  learned = scores[len(symbols):]
  names = [*_NAMES, *symbols]
  if kind == 'bpe':
    model = _bpe([*names, *(piece for piece, _ in learned)], merges_of(dict(learned)))
  else:
    model = {'type': 'Unigram', 'unk_id': 2, 'byte_fallback': False, 'vocab': [*((name, _NEVER) for name in names), *learned]}
  pattern = re.sub('|'.join(map(re.escape, _CLASSES)), lambda found: _CLASSES[found[0]], words)
  split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  added = [*_special_ids(), *((len(_NAMES) + i, symbol, False) for i, symbol in enumerate(symbols))]
  return _whole(model, {'type': 'Sequence', 'pretokenizers': [split, _BYTES]}, _BYTES, added)


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
  """Merges in an order that does what SentencePiece does by scores: the pair with the likeliest result, the leftmost of equals.

  A piece P may come of several pairs, which are equals to SentencePiece and are not in an order of merges. That matters where
  two of them overlap, as x|y|z with x + y = P = y + z. Then P has the period |x|, and the pair that is split there goes
  first. Only where |y| is a period as well, and x and y so are powers of one word, is there no order that is always right.
  """
  ranked = sorted((-score, piece[i:] != piece[:-i], i, piece) for piece, score in scores.items() for i in range(1, len(piece))
                  if piece[:i] in scores and piece[i:] in scores)
  return [(piece[:i], piece[i:]) for _, _, i, piece in ranked]


def _bpe(pieces: Iterable[str] | Mapping[str, int], merges: Iterable[Sequence[str]], unknown: str | None = None) -> Description:
  vocab = pieces if isinstance(pieces, Mapping) else {piece: i for i, piece in enumerate(pieces)}
  return {'type': 'BPE', 'dropout': None, 'unk_token': unknown, 'continuing_subword_prefix': None, 'end_of_word_suffix': None,
          'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False, 'vocab': vocab, 'merges': list(map(list, merges))}


def _special_ids() -> list[tuple[int, str, bool]]:
  return [(i, name, True) for i, name in enumerate(_NAMES)]


_BEGINS = {
  'type': 'TemplateProcessing', 'single': [{'SpecialToken': {'id': _NAMES[1], 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}],
  'pair': [{'Sequence': {'id': one, 'type_id': 0}} for one in 'AB'],
  'special_tokens': {_NAMES[1]: {'id': _NAMES[1], 'ids': [1], 'tokens': [_NAMES[1]]}}}
"""A separator before a text: what training has there."""


def _whole(model: Description, words: Description | None, decoder: Description, added: Sequence[tuple[int, str, bool]] = ()) -> Description:
  """A tokenizer.json; `added` are (id, text, whether it is special), by default our special ids."""
  tokens = [{'id': i, 'content': content, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': special}
            for i, content, special in added or _special_ids()]
  return {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': tokens, 'normalizer': None, 'pre_tokenizer': words,
          'post_processor': None if added and added[0][1] != _NAMES[0] else _BEGINS, 'decoder': decoder, 'model': model}
