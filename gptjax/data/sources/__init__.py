"""Sources: text files, JSON lines and Parquet, local or remote; TFDS and Hugging Face datasets; the embedded corpus.

A source yields documents in a fixed order. It is cut into parts that any process can read independently, so that work on
it can be divided, and yields one item per record: a document, a description of what is malformed, or None. Optional packages
and credentials are needed only by the sources that use them.
"""

from pathlib import Path

from gptjax.config import SourceConfig, UserError
from gptjax.data.sources.formats import open_files
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source, documents, malformed_error
from gptjax.data.sources.split import is_held_out, split_source
from gptjax.data.sources.stdlib import Stdlib
from gptjax.data.sources.tables import HuggingFace
from gptjax.files import expanded

__all__ = ['Document', 'Malformed', 'Part', 'Record', 'Source', 'documents', 'is_held_out', 'malformed_error', 'open_source',
           'split_source']


def open_source(config: SourceConfig, cache_dir: Path | None = None) -> Source:
  """Opens the source that a config describes, without reading its documents.

  Prepares a TFDS dataset that is not prepared yet, and downloads a Hugging Face dataset that is not in its cache. Only the embedded
  corpus needs `cache_dir`, where it stores its dataset.

  Raises:
    UserError: the source does not exist, or the config does not fit it.
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
  return open_files(config)
