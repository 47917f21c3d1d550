"""Opening of sources: TFDS, Hugging Face, the embedded corpus, or files and their format from a path, folder or glob."""

from collections.abc import Callable, Sequence
from pathlib import Path

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources.files import SUFFIXES, File, find, title
from gptjax.data.sources.source import Source
from gptjax.data.sources.stdlib import Stdlib
from gptjax.data.sources.tables import HuggingFace, Parquet
from gptjax.data.sources.text import JsonLines, TextFiles
from gptjax.files import expanded

_FORMATS: dict[str, tuple[Callable[[Sequence[File], str, SourceConfig], Source], tuple[str, ...]]] = {
  'JSON lines': (JsonLines, ('.jsonl', '.ndjson')),
  'Parquet': (Parquet, ('.parquet',)),
  'text': (TextFiles, ('.txt', '.text', '.md', '.rst', '.tex', '.py')),
  'JSON': (JsonLines, ('.json',)),
}
"""Files read in a folder; JSON and text may be compressed. A path or glob may name text files with any other suffix."""

_PRIORITIES = (('JSON lines', 'Parquet'), ('text',), ('JSON',))
"""Beside data files, text is their README or LICENSE and .json files are metadata; beside text, .json files are metadata."""


def open_source(config: SourceConfig, cache_dir: Path | None = None) -> Source:
  """Opens the source that a config describes, without reading its documents.

  Prepares a TFDS dataset that is not prepared yet, and downloads a Hugging Face dataset that is not in its cache. Only the
  embedded corpus needs `cache_dir`. Of files in several formats one is read: JSON lines or Parquet, then text, then .json files.
  Raises a UserError if the source does not exist, or the config does not fit it.
  """
  if not config.path:
    assert cache_dir is not None
    return Stdlib(cache_dir)
  if config.path.startswith('tfds:'):
    from gptjax.data.sources.tfds_source import TfdsRecords  # takes half a second to import
    return TfdsRecords(config)
  if config.path.startswith('hf:'):
    return HuggingFace(config)
  if '://' not in config.path and (expanded(config.path) / 'index.bin').exists():
    raise UserError('data.source.path', config.path, 'documents; this is a token store, which data.train takes')
  plain = tuple(suffix for _, suffixes in _FORMATS.values() for suffix in suffixes)
  files = find(config.path, (*plain, *(suffix + packed for suffix in plain if suffix != '.parquet' for packed in SUFFIXES)))
  by_kind: dict[str, list[File]] = {}
  for file in files:
    by_kind.setdefault(_kind(file.name), []).append(file)
  counts = {kind: f'{len(found):,} {kind} file{"s" * (len(found) != 1)}' for kind, found in by_kind.items()}
  kind, *conflicts = next(present for kinds in _PRIORITIES if (present := [kind for kind in kinds if kind in by_kind]))
  if conflicts:
    found = ', '.join(counts.values())
    raise UserError('data.source.path', config.path, f'files of one format, which a glob can select; there are {found}')
  if config.separator and kind != 'text':
    raise UserError('data.source.separator', config.separator, f'none for {kind} files: a record is a document')
  description = title(config.path)
  if len(files) > 1:
    description += f' ({"; ".join([counts.pop(kind), *(f"{count} ignored" for count in counts.values())])})'
  return _FORMATS[kind][0](by_kind[kind], description, config)


def _kind(name: str) -> str:
  uncompressed = name.removesuffix('.gz').removesuffix('.zst')
  return next((kind for kind, (_, suffixes) in _FORMATS.items()
               if (name if kind == 'Parquet' else uncompressed).lower().endswith(suffixes)), 'text')
