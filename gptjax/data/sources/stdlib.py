"""The embedded corpus: the source code of the running Python's standard library, available wherever Python is."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gptjax.config import UserError
from gptjax.data.sources.source import Document, Part, Source
from gptjax.files import locked

_EXCLUDED = ('__pycache__', 'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings', 'pydoc_data',
             'config-*', 'lib-dynload', '_sysconfigdata*.py', 'entities.py')
"""Third-party packages, test suites and generated tables: codecs, pydoc topics, build settings, HTML entities."""


def stdlib_modules(folder: Path) -> list[Document]:
  """Reads the standard library's modules, named like 'json/decoder.py', without empty files and those that are not UTF-8 (PEP 263).

  Raises a UserError if there are none (some distributions have only compiled modules).
  """
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
  """The modules as a TFDS dataset, in one part and sorted by name. Raises a UserError if this Python has no source files.

  The dataset is built in `cache_dir/tfds` when it is first read, in a folder named after the digest of the modules.
  """

  def __init__(self, cache_dir: Path, folder: Path | None = None):
    self._folder = Path(folder or sysconfig.get_path('stdlib'))
    documents = stdlib_modules(self._folder)
    self.names = [document.name for document in documents]
    self.size = sum(len(document.text.encode()) for document in documents)
    self.skip = 0.0
    self.description = f'standard library of Python {platform.python_version()}'
    self._digest = hashlib.sha256(json.dumps(list(map(dataclasses.astuple, documents))).encode()).hexdigest()
    self._data_dir = cache_dir / 'tfds' / self._digest[:16]

  def fingerprint(self) -> str:
    return self._digest

  def parts(self) -> Iterator[Part]:
    yield Part(self.description, '', 0, len(self.names), self.size)

  def read(self, part: Part) -> Iterator[Document]:
    # TFDS takes half a second to import, and only the first run with this corpus needs it.
    from gptjax.data.sources.tfds_source import PythonStdlib, prepare_quietly
    with locked(self._data_dir.parent / 'lock'):  # a run with another tokenizer may build the same dataset now
      builder = PythonStdlib(modules=stdlib_modules(self._folder), data_dir=self._data_dir, file_format='array_record')
      prepare_quietly(builder)
    records = builder.as_data_source(split='train')
    yield from sorted((Document(one['name'].decode(), one['text'].decode()) for one in records), key=lambda document: document.name)
