"""The data room: text becomes rows of token ids.

Documents (files, or the embedded corpus) are split, tokenized once into stores on disk, and kept in a cache; row i of a
run is then a pure function of (store, context, seed, i). numpy only: nothing in here knows of JAX or devices.
"""

from gptjax.data.documents import Document, read_files, split_documents
from gptjax.data.held_out import HeldOut, compression_yardsticks, export, open_held_out
from gptjax.data.prepare import Prepared, prepare
from gptjax.data.rows import Batch, EvalRows, TrainRows
from gptjax.data.store import TokenStore, write_store
from gptjax.data.tokenizers import TextStream, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    'Batch', 'Document', 'EvalRows', 'HeldOut', 'Prepared', 'TextStream', 'TokenStore', 'Tokenizer', 'TrainRows',
    'compression_yardsticks', 'export', 'load_tokenizer', 'open_held_out', 'prepare', 'read_files', 'split_documents',
    'train_tokenizer', 'write_store',
]
