"""Sources: text files, JSON lines and Parquet, local or remote; TFDS and Hugging Face datasets; the embedded corpus.

A source yields documents in a fixed order. It is cut into parts that any process can read independently, so that work on
it can be divided, and yields one item per record: a document, a description of a malformed one, or None. Optional packages
and credentials are needed only by the sources that use them.
"""

from gptjax.data.sources.opening import open_source
from gptjax.data.sources.selection import is_held_out, sample, split_source
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source, documents, malformed_error

__all__ = ['Document', 'Malformed', 'Part', 'Record', 'Source', 'documents', 'is_held_out', 'malformed_error', 'open_source',
           'sample', 'split_source']
