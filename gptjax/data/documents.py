"""Documents: named texts, read from files and held out for validation."""

import bisect
import dataclasses
import glob
import hashlib
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from gptjax.config import UserError

TEXT_SUFFIXES = ('.txt', '.text', '.md', '.rst', '.tex', '.py')
"""What counts as a text file when a folder is given; any other file can be asked for with a path or a glob."""


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and the name that says where it came from."""

  name: str
  text: str


def _digest(text: str) -> bytes:
  # Names of files need not be UTF-8; Python keeps what is not as lone surrogates.
  return hashlib.sha256(text.encode(errors='surrogateescape')).digest()


class TextFiles(Sequence[Document]):
  """UTF-8 files as a sequence of documents, each read when it is asked for.

  Bytes become text one to one: line ends stay as they are in the file.

  Args:
    files: path of each document by its name; the sequence is in the order of names.

  Raises:
    UserError: when a document is asked for whose file is not UTF-8 or cannot be read.
  """

  def __init__(self, files: dict[str, Path]):
    self.files = dict(sorted(files.items()))
    self._names = list(self.files)

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> Document:  # type: ignore[override]  # nobody needs slices
    name = self._names[index]
    try:
      return Document(name, self.files[name].read_bytes().decode())
    except UnicodeDecodeError as error:
      raise UserError(f'{self.files[name]}, byte {error.start}', error.object[error.start:error.start + 4],
                      'a file of UTF-8 text') from None
    except OSError as error:
      raise UserError('data.files', str(self.files[name]), f'a file that can be read ({error.strerror})') from None

  def sha256(self) -> str:
    """Hex digest of all names and texts: equal exactly when the documents are."""
    whole = hashlib.sha256()
    for document in self:
      whole.update(_digest(document.name) + _digest(document.text))
    return whole.hexdigest()


def read_files(pattern: str) -> TextFiles:
  """Documents of a file, of a folder's text files (at any depth) or of all files that a glob matches.

  A document's name is its path below the folder, or below the part of the glob that has no wildcard, so a folder that
  moves keeps its documents. Hidden files and files without a single byte are left out.

  Raises:
    UserError: nothing matches, or nothing that matches has text. A file that is not UTF-8 is one when it is read.
  """
  path = Path(pattern).expanduser()
  if path.is_file():
    root, found = path.parent, [path]
  elif path.is_dir():
    root, found = path, _glob(os.path.join(glob.escape(str(path)), '**', '*'), TEXT_SUFFIXES)
    if not found:
      raise UserError('data.files', pattern, f'a folder with text files ({", ".join(TEXT_SUFFIXES)}); for others, '
                      f"a glob such as '{path / '**' / '*.c'}'")
  else:
    root, found = _fixed_part(path), _glob(str(path), ('',))
  if not found:
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    raise UserError('data.files', pattern, 'a file, a folder or a glob that matches text files',
                    names=[os.path.join(os.path.dirname(pattern), sibling.name) for sibling in siblings])
  files = {file.relative_to(root).as_posix(): file for file in found if file.stat().st_size}
  if not files:
    raise UserError('data.files', pattern, 'files that are not empty')
  return TextFiles(files)


def _glob(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
  return [Path(name) for name in glob.glob(pattern, recursive=True) if name.endswith(suffixes) and os.path.isfile(name)]


def _fixed_part(path: Path) -> Path:
  """The folders a glob starts with, up to its first wildcard."""
  parts = path.parts[:-1]
  fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
  return Path(*parts[:fixed])


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[Sequence[Document], Sequence[Document]]:
  """Splits documents into (training, validation).

  A document is held out when the hash of its name falls into the lowest `fraction` of all hashes, so documents that
  come later do not move those already there. Among two or more the lowest is always held out and the highest never.
  A single document is split by position: its last `fraction` of characters is held out.

  Raises:
    UserError: a single document is too short to give both sides a character.
  """
  if len(documents) == 1:
    document = documents[0]
    # Exact arithmetic on the decimal that was written: in floats 1 - 0.9 is not 0.1.
    cut = int(len(document.text) * (1 - Fraction(str(fraction))))
    if not 0 < cut < len(document.text):
      raise UserError('data.valid_fraction', fraction, f'a share that leaves both training and validation text of '
                      f'the {len(document.text)} characters of {document.name}')
    return [Document(document.name, document.text[:cut])], [Document(document.name, document.text[cut:])]
  ranks = [int.from_bytes(_digest(document.name)[:8]) for document in documents]
  order = sorted(range(len(ranks)), key=ranks.__getitem__)
  held_out = bisect.bisect_left(order, fraction * 2**64, key=ranks.__getitem__)
  held_out = min(max(held_out, 1), len(order) - 1)
  return _Subset(documents, sorted(order[held_out:])), _Subset(documents, sorted(order[:held_out]))


class _Subset(Sequence[Document]):
  """Some of a sequence's documents, still read only when asked for."""

  def __init__(self, documents: Sequence[Document], indices: Sequence[int]):
    self._documents = documents
    self._indices = indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Document:  # type: ignore[override]  # nobody needs slices
    return self._documents[self._indices[index]]
