"""The embedded corpus: the sources of the standard library of the Python that runs this, ready wherever Python is."""

import fnmatch
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gptjax.config import UserError
from gptjax.data.documents import Document, TextFiles

_NO_FOLDERS = ('__pycache__', 'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings', 'pydoc_data',
               'config-*', 'lib-dynload')
_NO_FILES = ('_sysconfigdata*.py', 'entities.py')
"""Other people's packages, test suites, and tables that a script wrote: codecs, pydoc's topics, build settings, HTML's
entities."""


def stdlib_sources(folder: Path | None = None) -> TextFiles:
  """The standard library's modules as documents named like 'json/decoder.py', straight from where Python has them.

  Left out: third-party packages, test suites, generated tables, empty files, and files that are not UTF-8 (a module
  may declare another encoding, PEP 263).

  Args:
    folder: root of the library; the running interpreter's unless given.

  Raises:
    UserError: this Python has no sources (some embedded distributions have compiled modules only).
  """
  root = Path(folder or sysconfig.get_path('stdlib'))
  files = {path.relative_to(root).as_posix(): path for path in _modules(root) if _is_text(path)}
  if not files:
    raise UserError('data.files', '', f'text files: this Python has no sources of its standard library in {root}')
  return TextFiles(files)


def _modules(root: Path) -> Iterator[Path]:
  for folder, folders, files in os.walk(root):
    folders[:] = [name for name in folders if not _matches(name, _NO_FOLDERS)]
    yield from (Path(folder, name) for name in files if name.endswith('.py') and not _matches(name, _NO_FILES))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_text(path: Path) -> bool:
  try:
    return bool(path.read_bytes().decode())
  except UnicodeDecodeError:
    return False


def stdlib_documents(sources: TextFiles, cache_dir: Path) -> list[Document]:
  """The documents of `sources` through their TFDS dataset, built under `cache_dir/tfds` if it is not there yet.

  The dataset lies under the digest of the sources and its version is Python's, so another interpreter has another one.
  """
  # TFDS takes half a second to import, and only the first run with this corpus needs it.
  from gptjax.data.stdlib_builder import build_and_read
  return build_and_read(sources, cache_dir / 'tfds' / sources.sha256()[:16])
