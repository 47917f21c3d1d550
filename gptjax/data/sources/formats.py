"""Which of a pattern's files are read, and as what."""

from collections.abc import Callable, Sequence

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources.compressed import stem
from gptjax.data.sources.files import File, find, title
from gptjax.data.sources.jsonl import JsonLines
from gptjax.data.sources.parquet import Parquet
from gptjax.data.sources.source import Source
from gptjax.data.sources.text import TextFiles

_ENDINGS = {
    'JSON lines': ('.jsonl', '.ndjson'),
    'Parquet': ('.parquet',),
    'text': ('.txt', '.text', '.md', '.rst', '.tex', '.py'),
    'JSON': ('.json',),
}
"""What a folder gives. JSON and text may also be compressed; a path or a glob finds other text files, too."""

_CHOICES = (('JSON lines', 'Parquet'), ('text',), ('JSON',))
"""Beside data, texts are its README and LICENSE, and a .json file describes it; beside texts, it is none of them."""

_SOURCES: dict[str, Callable[[Sequence[File], str, SourceConfig], Source]] = {
    'JSON lines': JsonLines, 'JSON': JsonLines, 'Parquet': Parquet, 'text': TextFiles,
}


def open_files(config: SourceConfig) -> Source:
  """The source that a path, folder or glob is, here or at a URL.

  Of several formats, JSON lines or Parquet are read and the rest is left out, which the description says; then text;
  then .json files.

  Raises:
    UserError: there are no files, or both JSON lines and Parquet, or the config does not fit them.
  """
  plain = tuple(ending for endings in _ENDINGS.values() for ending in endings)
  files = find(config.path, (*plain, *(f'{ending}{packed}' for ending in plain if ending != '.parquet'
                                       for packed in ('.gz', '.zst'))))
  kinds: dict[str, list[File]] = {}
  for file in files:
    kinds.setdefault(_kind(file.name), []).append(file)
  choice = next(choice for choices in _CHOICES if (choice := [kind for kind in choices if kind in kinds]))
  if len(choice) > 1:
    there = ', '.join(f'{_counted(kinds[kind], kind)}' for kind in kinds)
    raise UserError('data.source.path', config.path, f'files of one format, as a glob can choose them; there are {there}')
  kind = choice[0]
  if config.separator and kind != 'text':
    raise UserError('data.source.separator', config.separator, f'none for {kind} files: a record is a document')
  description = title(config.path)
  if len(files) > 1:
    left_out = [f'{_counted(kinds[other], other)} left out' for other in kinds if other != kind]
    description += f' ({"; ".join([_counted(kinds[kind], kind), *left_out])})'
  return _SOURCES[kind](kinds[kind], description, config)


def _kind(name: str) -> str:
  return next((kind for kind, endings in _ENDINGS.items()
               if (name if kind == 'Parquet' else stem(name)).lower().endswith(endings)), 'text')


def _counted(files: Sequence[File], kind: str) -> str:
  return f'{len(files):,} {kind} file{"s" * (len(files) != 1)}'
