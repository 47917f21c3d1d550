"""GPT-2's tokenizer, from the two files that OpenAI published."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizers import export
from gptjax.data.tokenizers.tokenizer import ALPHABET, Tokenizer, in_bytes, utf8, write

ENCODER, MERGES = 'encoder.json', 'vocab.bpe'
"""The files: ids of tokens as JSON, and below a first line `#version: 0.2` the two halves of each merge, in their order."""
VOCAB, MERGES_TEXT = 'vocab.json', 'merges.txt'
"""What Hugging Face calls them."""

_SEPARATOR = '<|endoftext|>'

_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
r"""GPT-2's words as OpenAI's tiktoken writes them, without backtracking where none is needed. The words of
`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`."""

_LONG_SPACE = re.compile(r'(?<![^\S\x1c-\x1f])[^\S\x1c-\x1f]{65536,}')
r"""Long white space, Unicode's (Python's has four characters more). Its last character begins a word if anything follows,
`\s+(?!\S)`; tiktoken would step back from there with a stack as high as the space is long, and refuses to from 10^6 on."""


class Gpt2Tokenizer(Tokenizer):
  """GPT-2's byte-level BPE (Radford et al. 2019): 50,257 ids, the separator '<|endoftext|>' the last of them.

  Text that reads '<|endoftext|>' is text like any other. There is no pad id of its own: rows are masked by arrays, never
  by ids, so the separator serves.

  Args:
    directory: folder with encoder.json and vocab.bpe, or with vocab.json and merges.txt, which are the same; any byte-level BPE
      of that form will do.

  Raises:
    UserError: tiktoken is not there, a file is missing or damaged, or the two do not agree.
  """

  kind = 'gpt2'
  unk_id = None
  start_ids = ()  # OpenAI and transformers put nothing before a prompt

  def __init__(self, directory: Path):
    directory = Path(directory)
    theirs = (directory / MERGES_TEXT).exists() and not (directory / ENCODER).exists()
    names = (VOCAB, MERGES_TEXT) if theirs else (ENCODER, MERGES)
    self._files = {name: _read(directory / there) for name, there in zip((ENCODER, MERGES), names)}
    pieces = [in_bytes(character) for character in sorted(ALPHABET)] + list(_merged(self._files[MERGES], directory / names[1]))
    _check(pieces, self._files[ENCODER], directory / names[0])
    super().__init__([*pieces, b''])
    self.pad_id = self.bos_id = self.eos_id = len(pieces)
    self._encoding = _encoding({piece: rank for rank, piece in enumerate(pieces)})

  def encode(self, text: str, source: str = 'text') -> np.ndarray:
    utf8(text, source)
    ids, start = [], 0
    borders = (space.end() - 1 for space in _LONG_SPACE.finditer(text) if space.end() < len(text))
    for stop in [*borders, len(text)]:
      ids.append(self._encoding.encode_to_numpy(text[start:stop]))
      start = stop
    return np.concatenate(ids).astype(np.int32)

  def save(self, directory: Path) -> None:
    write(directory, {'kind': self.kind})
    self._write(directory, ENCODER, MERGES)

  def save_hugging_face(self, directory: Path) -> None:
    merges = [line.split(' ') for line in self._files[MERGES].split('\n')[1:] if line]
    description = export.gpt2(json.loads(self._files[ENCODER]), merges, _SEPARATOR)
    export.write_tokenizer(directory, description, dict.fromkeys(('bos_token', 'eos_token'), _SEPARATOR))
    self._write(directory, VOCAB, MERGES_TEXT)

  def _write(self, directory: Path, *names: str) -> None:
    for name, content in zip(names, (self._files[ENCODER], self._files[MERGES])):
      (directory / name).write_text(content, encoding='utf-8', newline='')


def _encoding(ranks: dict[bytes, int]) -> Any:
  try:
    import tiktoken  # only now: whoever brings no GPT-2 need not have it
  except ImportError:
    raise UserError('tokenizer', 'gpt2', 'a machine with the tiktoken package: pip install tiktoken') from None
  # Without special tokens all text is text.
  return tiktoken.Encoding('gpt2', pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})


def _read(path: Path) -> str:
  try:
    return path.read_bytes().decode()
  except OSError as error:
    raise UserError('tokenizer', str(path), f"GPT-2's {path.name} ({error.strerror})") from None
  except UnicodeDecodeError as error:
    raise UserError(f'{path}, byte {error.start}', error.object[error.start:error.start + 4], 'UTF-8 text') from None


def _merged(merges: str, path: Path) -> Iterator[bytes]:
  """The bytes that each merge makes, in the order of merges."""
  for number, line in enumerate(merges.split('\n')[1:], 2):
    if not line:
      continue  # the end of the file
    try:
      left, right = map(in_bytes, line.split(' '))
    except (ValueError, KeyError):
      raise UserError(f'{path}:{number}', line[:80], 'two tokens and a space between them') from None
    yield left + right


def _check(pieces: list[bytes], encoder: str, path: Path) -> None:
  """Refuses files that disagree: encoder.json has each piece at its place, the separator behind them and nothing else."""
  try:
    found = json.loads(encoder)
  except json.JSONDecodeError as error:
    raise UserError(f'{path}:{error.lineno}', encoder[error.pos:error.pos + 40], f'JSON ({error.msg})') from None
  except (ValueError, RecursionError) as error:  # numbers too long for Python, brackets too deep
    raise UserError(str(path), encoder[:40], f'JSON ({error})') from None
  if not isinstance(found, dict):
    raise UserError(str(path), encoder[:40], 'an object of tokens and their ids')
  wanted = {piece.decode('latin-1').translate(dict(enumerate(ALPHABET))): rank for rank, piece in enumerate(pieces)}
  wanted[_SEPARATOR] = len(pieces)
  for token in [*wanted, *found]:
    if found.get(token) != wanted.get(token):
      raise UserError(f'{path}: {token!r}', found.get(token), f'{wanted.get(token)}, the id that the merges give it')
