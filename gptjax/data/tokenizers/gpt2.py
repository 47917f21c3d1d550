"""GPT-2's tokenizer, from the two files that OpenAI published."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gptjax.config import UserError
from gptjax.data.folders import library_errors
from gptjax.data.tokenizers import export
from gptjax.data.tokenizers.published import json_object
from gptjax.data.tokenizers.tokenizer import ALPHABET, Tokenizer, from_alphabet, to_alphabet, utf8

OPENAI_FILES = ('encoder.json', 'vocab.bpe')
"""Ids by token, and, after a line `#version: 0.2`, one merge per line in order, as two tokens."""
HUGGING_FACE_FILES = ('vocab.json', 'merges.txt')
"""The same files under other names."""

_SEPARATOR = '<|endoftext|>'

_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
r"""GPT-2's pattern `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` as OpenAI's tiktoken writes it, with
less backtracking."""

_LONG_SPACE = re.compile(r'(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{65536,}')
r"""Long white space by Unicode's definition (Python's has four more characters). By `\s+(?!\S)` its last character starts a word if
anything follows; tiktoken's regex engine would backtrack to there with a stack as deep as the space is long, and fails from 10^6 on."""


class Gpt2Tokenizer(Tokenizer):
  """GPT-2's byte-level BPE (Radford et al. 2019): 50,257 ids, of which '<|endoftext|>' is the last; or another one in such files.

  Uses tiktoken, which is ten times as fast as the `tokenizers` package. The separator is also the pad id, because rows are masked by
  arrays and not by ids. Raises a UserError if tiktoken is not installed, a file is missing or damaged, or the two are inconsistent.
  """

  kind = 'gpt2'
  unk_id = None
  start_ids = ()  # OpenAI and transformers put nothing before a prompt

  def __init__(self, directory: Path):
    directory = Path(directory)
    renamed = (directory / HUGGING_FACE_FILES[1]).exists() and not (directory / OPENAI_FILES[0]).exists()
    vocab_path, merges_path = (directory / name for name in (HUGGING_FACE_FILES if renamed else OPENAI_FILES))
    self._vocab, self._merges = _read(vocab_path), _read(merges_path)
    self._pairs = _pairs(self._merges, merges_path)
    pieces = [*map(from_alphabet, sorted(ALPHABET)), *(from_alphabet(left + right) for left, right in self._pairs)]
    _check_vocab(json_object(str(vocab_path), self._vocab), pieces, vocab_path)
    super().__init__([*pieces, b''])
    self.pad_id = self.bos_id = self.eos_id = len(pieces)
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    with library_errors('tokenizer', 'gpt2'):
      import tiktoken
    # Without special tokens, all text is encoded as text.
    self._encoding = tiktoken.Encoding('gpt2', pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    ids, start = [], 0
    cuts = (space.end() - 1 for space in _LONG_SPACE.finditer(text) if space.end() < len(text))
    for stop in [*cuts, len(text)]:
      ids.append(self._encoding.encode_to_numpy(text[start:stop]))
      start = stop
    return np.concatenate(ids).astype(np.int32)

  def save(self, directory: Path) -> None:
    super().save(directory)
    self._write(directory, OPENAI_FILES)

  def save_hugging_face(self, directory: Path) -> None:
    tokenizer = export.gpt2_tokenizer(json.loads(self._vocab), self._pairs, _SEPARATOR)
    export.write_tokenizer(directory, tokenizer, dict.fromkeys(('bos_token', 'eos_token'), _SEPARATOR))
    self._write(directory, HUGGING_FACE_FILES)

  def _write(self, directory: Path, names: tuple[str, str]) -> None:
    for name, content in zip(names, (self._vocab, self._merges)):
      (directory / name).write_text(content, encoding='utf-8', newline='')


def _read(path: Path) -> str:
  try:
    return path.read_bytes().decode()
  except OSError as error:
    raise UserError('tokenizer', str(path), f"GPT-2's {path.name} ({error.strerror})") from None
  except UnicodeDecodeError as error:
    raise UserError(f'{path}, byte {error.start}', error.object[error.start:error.start + 4], 'UTF-8 text') from None


def _pairs(merges: str, path: Path) -> list[tuple[str, str]]:
  """The two tokens of each merge, in order."""
  pairs, alphabet = [], {*ALPHABET}
  for number, line in enumerate(merges.split('\n')[1:], 2):
    match line.split(' '):
      case [left, right] if alphabet.issuperset(left + right):
        pairs.append((left, right))
      case tokens if tokens != ['']:  # as at the end of the file
        raise UserError(f'{path}:{number}', line[:80], 'two tokens separated by a space')
  return pairs


def _check_vocab(found: Mapping[str, object], pieces: list[bytes], path: Path) -> None:
  """Raises a UserError unless the vocabulary has each piece's index, the next id for the separator, and nothing else."""
  expected = {to_alphabet(piece): rank for rank, piece in enumerate(pieces)} | {_SEPARATOR: len(pieces)}
  for token in [*expected, *found]:
    if found.get(token) != expected.get(token):
      raise UserError(f'{path}: {token!r}', found.get(token), f'{expected.get(token)}, the id that the merges imply')
