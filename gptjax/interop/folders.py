"""The text files of a Hugging Face folder: config.json, the tokenizer's files, model card and licence."""

from pathlib import Path

CONFIG, GENERATION = 'config.json', 'generation_config.json'

_VOCABULARY = ('tokenizer.json', 'vocab*', 'encoder.json', '*.model', '*.tiktoken')
"""Patterns of files: every tokenizer has at least one of them."""

_TOKENIZER = (*_VOCABULARY, 'merges.txt', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'chat_template*')

_KEPT = (CONFIG, GENERATION, 'README.md', 'LICENSE*', 'USE_POLICY*')


def copy_text_files(source: Path, target: Path, tokenizer: bool = True) -> None:
  """Copies config, model card and licence of a folder, and with `tokenizer` the tokenizer's files."""
  for path in _matching(source, (*_KEPT, *_TOKENIZER) if tokenizer else _KEPT):
    (target / path.name).write_bytes(path.read_bytes())


def has_tokenizer(folder: Path) -> bool:
  """Whether a folder has the files of a tokenizer."""
  return bool(_matching(folder, _VOCABULARY))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
  return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
