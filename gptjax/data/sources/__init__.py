"""Sources: text files, JSON lines and Parquet, local or remote; TFDS and Hugging Face datasets; the embedded corpus.

A source has documents in a fixed order, in parts that any process can read independently. Optional packages and credentials are needed
only by the sources that use them.
"""

from gptjax.data.sources.examples import with_mismatched
from gptjax.data.sources.opening import is_json_lines, open_source
from gptjax.data.sources.selection import is_held_out, sample, split_source
from gptjax.data.sources.source import Document, Malformed, Part, Record, Source, Turn, documents, malformed_error
