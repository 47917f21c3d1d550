"""The sources room: every way documents come in.

A source is documents in a fixed order: text files, JSON lines and Parquet, here or in an object store; TFDS and Hugging
Face datasets; the embedded corpus. Each is cut into parts that any process can read by itself, so work on it can be
shared out, and gives one item a record: a document, what is malformed about it, or nothing. What is optional, packages
as well as credentials, is asked for only by the source that needs it.
"""

from pathlib import Path

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources.formats import open_files
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source, documents, refuse
from gptjax.data.sources.split import is_held_out, split_source
from gptjax.data.sources.stdlib import Stdlib
from gptjax.files import expanded

__all__ = ['Document', 'Malformed', 'Part', 'Record', 'Source', 'documents', 'is_held_out', 'open_source', 'refuse', 'split_source']


def open_source(config: SourceConfig, cache_dir: Path | None = None) -> Source:
  """Finds the documents that a config asks for, without reading them.

  A TFDS dataset that is not prepared yet, or a Hugging Face dataset that is not downloaded, is now.

  Args:
    config: where they are and how they are read.
    cache_dir: where the embedded corpus keeps its dataset; only that needs it.

  Raises:
    UserError: they are not there, or the config does not fit them.
  """
  if not config.path:
    assert cache_dir is not None
    return Stdlib(cache_dir)
  if config.path.startswith('tfds:'):
    from gptjax.data.sources.tfds_source import TfdsRecords  # half a second of imports
    return TfdsRecords(config)
  if config.path.startswith('hf:'):
    from gptjax.data.sources.hugging_face import HuggingFace
    return HuggingFace(config)
  if '://' not in config.path and (expanded(config.path) / 'index.bin').exists():
    raise UserError('data.source.path', config.path, 'documents; this is a token store, which data.train takes')
  return open_files(config)
