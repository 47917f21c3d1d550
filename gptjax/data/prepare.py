"""Preparation: from documents to a tokenizer and two token stores, once, kept in a cache for every later run."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from gptjax.config import DataConfig
from gptjax.data.documents import Document, TextFiles, read_files, split_documents
from gptjax.data.progress import announce, counted
from gptjax.data.stdlib_corpus import stdlib_documents, stdlib_sources
from gptjax.data.store import TokenStore, write_store
from gptjax.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

_FORMAT = 1  # Raise it when what is prepared, or how, changes: data of another format is not looked at.
_VALID_TEXT = 'valid.txt'


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """What training and evaluation read."""

  tokenizer: Tokenizer
  """made from the training documents"""
  train: TokenStore
  """training documents"""
  valid: TokenStore
  """held-out documents"""
  directory: Path
  """where all of it lies"""
  fingerprint: str
  """hex; equal for equal documents, split and tokenizer config"""
  description: str
  """one line for people: documents, targets and bytes of each side, tokenizer, bytes per token"""

  @property
  def valid_text(self) -> Path:
    """A file with the texts of the held-out documents, one after another."""
    return self.directory / _VALID_TEXT


def prepare(config: DataConfig, cache_dir: Path) -> Prepared:
  """Finds the prepared data of a config in the cache, or prepares it there.

  Two processes that want the same data do not work twice: the second waits for the first. A folder appears in the
  cache only when it is whole.

  Args:
    config: documents, split and tokenizer; `context` and `isolate_documents` do not matter here.
    cache_dir: the data lies in `cache_dir/data/<fingerprint>`.

  Raises:
    UserError: the files or the split of the config do not work out.
  """
  sources = read_files(config.files) if config.files else stdlib_sources()
  fingerprint = _fingerprint(config, sources)
  directory = Path(cache_dir) / 'data' / fingerprint
  if not directory.exists():
    with _locked(directory.with_suffix('.lock')):
      if not directory.exists():
        # Only who holds the lock builds, so whatever lies here is from a run that died.
        building = directory.with_suffix('.building')
        shutil.rmtree(building, ignore_errors=True)
        _build(building, config, sources)
        building.rename(directory)
  return _open(directory, fingerprint, config)


def _fingerprint(config: DataConfig, sources: TextFiles) -> str:
  parts = [_FORMAT, sources.sha256(), config.valid_fraction, dataclasses.asdict(config.tokenizer)]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _build(directory: Path, config: DataConfig, sources: TextFiles) -> None:
  documents = sources if config.files else _embedded(sources, directory.parents[1])
  train, valid = split_documents(documents, config.valid_fraction)
  tokenizer = train_tokenizer(config.tokenizer, documents if config.tokenizer.kind == 'chars' else train)
  tokenizer.save(directory / 'tokenizer')
  write_store(directory / 'train', tokenizer, train, 'tokenizing for training')
  write_store(directory / 'valid', tokenizer, valid, 'tokenizing for validation')
  with (directory / _VALID_TEXT).open('wb') as file:
    file.writelines(document.text.encode() for document in valid)


def _embedded(sources: TextFiles, cache_dir: Path) -> list[Document]:
  with _locked(cache_dir / 'tfds' / 'lock'):  # data with another tokenizer may need the same dataset now
    return stdlib_documents(sources, cache_dir)


def _open(directory: Path, fingerprint: str, config: DataConfig) -> Prepared:
  train, valid = TokenStore.open(directory / 'train'), TokenStore.open(directory / 'valid')
  corpus = config.files or f'standard library of Python {platform.python_version()}'
  sides = (f'{side} {counted(store.documents)}, {store.targets:,} tokens, {store.bytes:,} bytes'
           for side, store in (('train', train), ('valid', valid)))
  description = (f'{corpus}; {"; ".join(sides)}; tokenizer {config.tokenizer.kind}, {train.vocab_size:,} ids, '
                 f'{valid.bytes / valid.targets:.3f} bytes per token on valid')
  return Prepared(load_tokenizer(directory / 'tokenizer'), train, valid, directory, fingerprint, description)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Holds a lock file while the body runs; waits for whoever has it. The system frees the lock of a killed process."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      announce(f'waiting for another process that prepares the same data ({path})')
      fcntl.flock(file, fcntl.LOCK_EX)
    yield
