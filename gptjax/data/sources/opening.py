"""Opening of sources: TFDS, Hugging Face, files of a path, folder or glob, or the embedded corpus: Python's standard library."""

import codecs
import contextlib
import fnmatch
import hashlib
import json
import os
import platform
import posixpath
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.config import SourceConfig, UserError, entry
from gptjax.data.sources.files import File, find, opened, packing, title
from gptjax.data.sources.source import Document, Part, Source
from gptjax.data.sources.tables import HuggingFace, Parquet
from gptjax.data.sources.text import JsonLines, JsonLists, TextFiles
from gptjax.files import expanded, locked


def _refuse(_files: Sequence[File], _description: str, config: SourceConfig) -> Source:
  kinds = ', '.join(kind for kind, format in _FORMATS.items() if format.open != _refuse)
  raise UserError('data.source.path', config.path, f"{kinds}, and no CSV; pandas.read_csv(FILE).to_json('FILE.jsonl', orient='records', "
                  "lines=True) converts it; to train on the file as it is, rename it to .txt")


def _open_json(files: Sequence[File], description: str, config: SourceConfig) -> Source:
  with opened(files[0].path) as file:
    is_list = file.read(1024).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b'[')
  return (JsonLists if is_list else JsonLines)(files, description, config)


class _Format(NamedTuple):
  open: Callable[[Sequence[File], str, SourceConfig], Source]
  suffixes: tuple[str, ...]
  rank: int
  """Files of a higher rank are ignored beside files of a lower one."""
  packed: bool = True
  """whether files may also be compressed (.gz, .zst)"""


_FORMATS = {
  'JSON lines': _Format(JsonLines, ('.jsonl', '.ndjson'), 0),
  'Parquet': _Format(Parquet, ('.parquet',), 0, packed=False),
  'text': _Format(TextFiles, ('.txt', '.text', '.md', '.rst', '.tex', '.py'), 1),  # beside data: their README or LICENSE
  'JSON': _Format(_open_json, ('.json',), 2),  # beside others: metadata
  'CSV': _Format(_refuse, ('.csv', '.tsv'), 3),
}
"""By the ending of a file's name, in any case. A path or glob may name text files with other endings."""

_EXCLUDED = ('__pycache__', 'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings', 'pydoc_data',
             'config-*', 'lib-dynload', '_sysconfigdata*.py', 'entities.py')
"""Third-party packages, test suites and generated tables: codecs, pydoc topics, build settings, HTML entities."""


def open_source(config: SourceConfig, cache_dir: Path | None = None) -> Source:
  """Opens the source that a config describes, without reading its documents.

  Prepares a TFDS dataset that is not prepared yet, and downloads a Hugging Face dataset that is not in its cache. Only the
  embedded corpus needs `cache_dir`. Of files in several formats one is read: JSON lines or Parquet, then text, then .json files.
  Raises a UserError if the source does not exist, or the config does not fit it.
  """
  if not config.path:
    _check_unused(config, 'the built-in corpus', 'text', *_EXAMPLES, 'split', 'separator')
    assert cache_dir is not None
    return Stdlib(cache_dir)
  if config.path.startswith(('tfds:', 'hf:')):
    _check_unused(config, 'datasets', 'separator')
  if config.path.startswith('python:'):
    return entry({}, 'data.source.path', config.path.removeprefix('python:'))(config)
  if config.path.startswith('tfds:'):
    from gptjax.data.sources.tfds_source import TfdsRecords  # takes half a second to import
    return TfdsRecords(config)
  if config.path.startswith('hf:'):
    return HuggingFace(config)
  if '://' not in config.path and (expanded(config.path) / 'index.bin').exists():
    raise UserError('data.source.path', config.path, 'documents; this folder is a token store: put it in data.train')
  files, is_folder = find(config.path)
  by_kind: dict[str, list[File]] = {}
  for file in files:
    by_kind.setdefault(_kind(file.name) or ('other' if is_folder else 'text'), []).append(file)
  if [*by_kind] == ['other']:
    endings = ' '.join(f'{suffix}[.gz|.zst]' if format.packed else suffix
                       for format in _FORMATS.values() if format.open != _refuse for suffix in format.suffixes)
    raise UserError('data.source.path', config.path, f"a folder with files of a supported type ({endings}); for others, a glob such as "
                    f"'{posixpath.join(config.path, '**', '*.c')}'")
  counts = {kind: f'{len(found):,} {kind} file{"s" * (len(found) != 1)}' for kind, found in by_kind.items()}
  rank = min(format.rank for kind, format in _FORMATS.items() if kind in by_kind)
  kind, *conflicts = [kind for kind, format in _FORMATS.items() if kind in by_kind and format.rank == rank]
  if conflicts:
    raise UserError('data.source.path', config.path, f'files of one format; a glob such as DIR/*.jsonl selects them; there are '
                    f'{", ".join(counts.values())}')
  _check_unused(config, f'{kind} files', 'split', *(('text', *_EXAMPLES) if kind == 'text' else ('separator',)))
  description = title(config.path)
  if len(files) > 1:
    description += f' ({"; ".join([counts.pop(kind), *(f"{count} ignored" for count in counts.values())])})'
  return _FORMATS[kind].open(by_kind[kind], description, config)


_EXAMPLES = ('prompt', 'messages', 'label')
_UNUSED = {**dict.fromkeys(('text', *_EXAMPLES), 'they have no records'),
           'split': 'only tfds: and hf: datasets have splits', 'separator': 'a record is a document'}


def _check_unused(config: SourceConfig, kind: str, *options: str) -> None:
  """Raises a UserError if an option is set that sources of a kind do not have."""
  for option in options:
    if (value := getattr(config, option)) != getattr(SourceConfig, option):
      raise UserError(f'data.source.{option}', value, f'none for {kind}: {_UNUSED[option]}')


def _kind(name: str) -> str:
  """The format that the ending of a file's name stands for; '' if it stands for none."""
  return next((kind for kind, format in _FORMATS.items()
               if name.lower().removesuffix(packing(name) if format.packed else '').endswith(format.suffixes)), '')


def is_json_lines(name: str) -> bool:
  """Whether the ending of a file's name stands for JSON lines."""
  return _kind(name) == 'JSON lines'


def stdlib_modules(folder: Path) -> list[Document]:
  """Reads the library's modules, named like 'json/decoder.py', if not empty and in UTF-8. Raises a UserError if there are none."""
  is_excluded = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in _EXCLUDED)
  documents = []
  for parent, folders, files in os.walk(folder):
    folders[:] = [name for name in folders if not is_excluded(name)]
    for path in (Path(parent, name) for name in files if name.endswith('.py') and not is_excluded(name)):
      with contextlib.suppress(UnicodeDecodeError):
        if text := path.read_bytes().decode():
          documents.append(Document(path.relative_to(folder).as_posix(), text))
  if not documents:
    raise UserError('data.source.path', '', f'text files: this Python has no sources of its standard library in {folder}')
  return sorted(documents, key=lambda document: document.name)


class Stdlib(Source):
  """The modules, sorted by name, as a TFDS dataset that is built in `cache_dir/tfds/DIGEST` when it is first read."""

  def __init__(self, cache_dir: Path, folder: Path | None = None):
    self._folder = Path(folder or sysconfig.get_path('stdlib'))
    documents = stdlib_modules(self._folder)
    self.document_bytes = {document.name: len(document.text.encode()) for document in documents}
    self.size = sum(self.document_bytes.values())
    self.skip = 0.0
    self.description = f'standard library of Python {platform.python_version()}'
    self._digest = hashlib.sha256(json.dumps([(document.name, document.text) for document in documents]).encode()).hexdigest()
    self._data_dir = cache_dir / 'tfds' / self._digest[:16]

  def fingerprint(self) -> str:
    return self._digest

  def parts(self) -> Iterator[Part]:
    yield Part(self.description, '', 0, len(self.document_bytes), self.size)

  def read(self, part: Part) -> Iterator[Document]:
    # TFDS takes half a second to import, and only the first run with this corpus needs it.
    from gptjax.data.sources.tfds_source import PythonStdlib, prepare_quietly
    with locked(self._data_dir.parent / 'lock'):  # a run with another tokenizer may build the same dataset now
      builder = PythonStdlib(modules=stdlib_modules(self._folder), data_dir=self._data_dir, file_format='array_record')
      prepare_quietly(builder)
    records = builder.as_data_source(split='train')
    yield from sorted((Document(one['name'].decode(), one['text'].decode()) for one in records), key=lambda document: document.name)
