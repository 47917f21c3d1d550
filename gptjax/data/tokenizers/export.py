"""Export of our tokenizers as Hugging Face's tokenizer.json and tokenizer_config.json, which transformers loads."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

SPECIAL_TOKENS = {'pad_token': '<pad>', 'bos_token': '<s>', 'eos_token': '<s>', 'unk_token': '<unk>'}
"""Names of ids 0, 1 and 2; SentencePiece's own, so that no piece that it learns has one of them."""

_NAMES = ['<pad>', '<s>', '<unk>']
_UNREACHABLE = -1e6  # a unigram score so low that no segmentation uses the piece
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

_SPACE = '\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'
_CLASSES = {
  r'[^\w\n]': r'[^\p{L}\p{N}_' '\n]', r'[^\W\d]': r'[\p{L}\p{Nl}\p{No}_]', r'[^\w\s]': rf'[^\p{{L}}\p{{N}}_{_SPACE}]',
  r'\d': r'\p{Nd}', r'\s': f'[{_SPACE}]', r'\S': f'[^{_SPACE}]'}
"""Python's character classes for Oniguruma, whose `\\w` includes combining marks and whose `\\s` excludes U+001C to U+001F."""


def write_tokenizer(directory: Path, tokenizer: tokenizers.Tokenizer, special_tokens: Mapping[str, str] = SPECIAL_TOKENS) -> None:
  """Writes tokenizer.json and tokenizer_config.json to a folder, created if necessary."""
  directory.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(directory / 'tokenizer.json'))
  # As with our tokenizers, text that looks like a special token is encoded as text.
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False, 'split_special_tokens': True}
  (directory / 'tokenizer_config.json').write_text(json.dumps({**config, **special_tokens}, indent=2) + '\n')


_PLAIN_CHAT = """\
{%- for message in messages %}
{{- '\\n\\n' if loop.previtem and loop.previtem.role == 'assistant' }}
{{- '### ' + message.role | capitalize + ':\\n' + message.content }}
{{- eos_token if message.role == 'assistant' else '\\n\\n' }}
{%- endfor %}
{{- '### Assistant:\\n' if add_generation_prompt }}"""


def write_plain_chat(directory: Path, begins: bool) -> None:
  """Adds the template of `Tokenizer.plain_chat` to a folder of files that transformers loads; `begins`: with bos."""
  (directory / 'chat_template.jinja').write_text('{{- bos_token }}' * begins + _PLAIN_CHAT)
  path = directory / 'tokenizer_config.json'
  config = json.loads(path.read_text()) if path.exists() else {}
  # The template writes eos as text, so texts of users that look like it become it too.
  path.write_text(json.dumps({**config, 'split_special_tokens': False}, indent=2) + '\n')


def byte_tokenizer(alphabet: str) -> tokenizers.Tokenizer:
  """One id per byte; `alphabet` [256] is the character that represents each byte."""
  return _tokenizer(_bpe([*_NAMES, *alphabet]), _BYTE_LEVEL, decoders.ByteLevel())


def char_tokenizer(characters: str) -> tokenizers.Tokenizer:
  """One id per character. Unlike ours, which rejects other characters, it encodes them as the unknown id."""
  return _tokenizer(_bpe([*_NAMES, *characters], unk_token='<unk>'), None, decoders.Fuse())


def gpt2_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], separator: str) -> tokenizers.Tokenizer:
  """GPT-2's byte-level BPE."""
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  tokenizer.add_special_tokens([tokenizers.AddedToken(separator, normalized=False)])
  return tokenizer


def subword_tokenizer(kind: str, scores: Sequence[tuple[str, float]], words: str, symbols: Sequence[str]) -> tokenizers.Tokenizer:
  """A SentencePiece model, 'bpe' or 'unigram', of words, given by Python's regular expression.

  `scores` are (piece, score) in the order of ids, without the special ids and beginning with `symbols`. The ids are the same, except
  for letters newer than the Unicode version of Python or of the `tokenizers` package, and where unigram segmentations are equally
  likely, such as two runs of spaces in either order: SentencePiece compares sums in float32 (549 of 841,630 words of the standard
  library, with 700 ids).
  """
  learned, names = scores[len(symbols):], [*_NAMES, *symbols]
  model: models.Model
  if kind == 'bpe':
    model = _bpe([*names, *(piece for piece, _ in learned)], merges_from_scores(dict(learned)))
  else:
    model = models.Unigram([*((name, _UNREACHABLE) for name in names), *learned], unk_id=2)
  pattern = re.sub('|'.join(map(re.escape, _CLASSES)), lambda found: _CLASSES[found[0]], words)
  split = pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated')
  return _tokenizer(model, pre_tokenizers.Sequence([split, _BYTE_LEVEL]), decoders.ByteLevel(), symbols)


def merges_from_scores(scores: Mapping[str, float]) -> list[tuple[str, str]]:
  """Orders merges to have the effect of SentencePiece's scores: the pair with the best result first, the leftmost of equals.

  Several pairs may give the same piece P; their order matters where two overlap, as in x|y|z with x + y = P = y + z. Then P has the
  period |x|, and the pair that is split there goes first. Only where x and y are powers of one word is no order always right.
  """
  ranked = sorted((-score, piece[i:] != piece[:-i], i, piece) for piece, score in scores.items() for i in range(1, len(piece))
                  if piece[:i] in scores and piece[i:] in scores)
  return [(piece[:i], piece[i:]) for _, _, i, piece in ranked]


def _bpe(pieces: Sequence[str], merges: list[tuple[str, str]] | None = None, unk_token: str | None = None) -> models.BPE:
  return models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges or [], unk_token=unk_token)


def _tokenizer(model: models.Model, pre_tokenizer: pre_tokenizers.PreTokenizer | None, decoder: decoders.Decoder,
               symbols: Sequence[str] = ()) -> tokenizers.Tokenizer:
  """A tokenizer with our special ids, which puts the separator before a text, as training does."""
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizer
  tokenizer.decoder = decoder
  tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', pair='$A $B', special_tokens=[('<s>', 1)])
  tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in _NAMES])
  tokenizer.add_tokens([tokenizers.AddedToken(symbol, normalized=False) for symbol in symbols])
  return tokenizer
