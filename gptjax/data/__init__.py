"""Data: text becomes rows of token ids.

Documents of a source are tokenized into stores, which are cut into rows. Row i of a run is a pure function of (data config, seed, i).
No module here imports JAX; only Grain, which loads batches, does.
"""

from gptjax.data.filters import Contamination, Filters
from gptjax.data.mixture import Mixture
from gptjax.data.naive_bayes import NaiveBayes, classified_texts
from gptjax.data.prepare import HeldOut, Prepared, compression_baselines, eval_rows, export, open_held_out, prepare, train_rows
from gptjax.data.progress import ProgressBar
from gptjax.data.rows import Batch, Column, EvalRows, Packed, TrainRows, Windows, batches
from gptjax.data.sources import Document, Source, documents, is_json_lines, open_source, split_source
from gptjax.data.store import TokenStore
from gptjax.data.tokenizers import TextStream, Tokenizer, load_tokenizer, train_tokenizer
from gptjax.data.tokenizing import Recipe, cores, write_store
