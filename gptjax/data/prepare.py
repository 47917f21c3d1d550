"""Preparation: from a config's data to a tokenizer, token stores and the layout of rows, each made once and kept."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

from gptjax.config import Config, DataConfig, Duration, UserError, duration_in_steps, in_unit_of_steps
from gptjax.data.encoding import Recipe
from gptjax.data.mixture import Mixture
from gptjax.data.packing import plan
from gptjax.data.progress import counted
from gptjax.data.rows import Layout, Packed, TrainRows, Windows
from gptjax.data.sampling import sample
from gptjax.data.sources import Source, documents, open_source, split_source
from gptjax.data.store import TokenStore
from gptjax.data.tokenizing import write_store
from gptjax.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from gptjax.files import atomic_directory

_FORMAT = 3  # Raise it when what is prepared, or how, changes: data of another format is not looked at.


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
  """What training and evaluation read."""

  tokenizer: Tokenizer
  """of all stores"""
  layouts: Sequence[Layout]
  """how each training store becomes rows"""
  valid: dict[str, TokenStore]
  """held-out documents: sets by name"""
  tags: dict[str, list[str]]
  """names of the sets that each tag has"""
  fingerprint: str
  """hex; equal for equal documents, splits and tokenizer"""
  description: str
  """one line for people: documents, tokens and bytes of each side, tokenizer, bytes per token"""


def prepare(config: DataConfig, cache_dir: Path, processes: int = 1) -> Prepared:
  """Opens the stores of a config, or makes them from its source and keeps them in the cache for later runs.

  Two processes that want the same data do not work twice: the second waits for the first. A folder appears in the
  cache only when it is whole.

  Args:
    config: of the data.
    cache_dir: a source's stores lie in `cache_dir/data`, plans of packed rows in `cache_dir/plans`.
    processes: most that tokenize.

  Raises:
    UserError: a source that cannot be read or split, stores that are damaged or do not belong together.
  """
  train, valid = _stores(config) if config.train else _from_source(config, Path(cache_dir), processes)
  tokenizer = _common_tokenizer([*train.values(), *valid.values()])
  for store in (*train.values(), *valid.values()):
    store.check()
  tags: dict[str, list[str]] = {}
  for one in config.valid:
    for tag in one.tags:
      tags.setdefault(tag, []).append(one.name)
  layouts = [_layout(store, config, Path(cache_dir)) for store in train.values()]
  parts = [[store.sha256 for store in train.values()], {name: store.sha256 for name, store in valid.items()}, tags, tokenizer.sha256]
  return Prepared(tokenizer, layouts, valid, tags, hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16],
                  _description(config, tokenizer, dict(zip(train, layouts)), valid))


def train_rows(config: Config, data: Prepared) -> TrainRows:
  """The rows of a run; they depend on its data, its seed and, for phases given in steps, on its batch size."""
  layouts, parts = data.layouts, config.data.train
  counts = [layout.count for layout in layouts]
  epoch = sum(counts)

  def first_row(start: Duration) -> int:
    # A step is a batch of rows; what a duration comes to in rows is its steps at a batch of one.
    rows = duration_in_steps('data.phases: start', start, batch_size=1, context=config.data.context, rows_per_epoch=epoch)
    return rows * config.batch_size if in_unit_of_steps(start) else rows

  mixture = Mixture(counts, [part.weight for part in parts] or [1.0],
                    [math.ceil(part.epochs * count) for part, count in zip(parts, counts)],
                    [(first_row(phase.start), phase.weights) for phase in config.data.phases])
  return TrainRows(layouts, mixture, config.data.context, config.seed, config.data.isolate_documents)


def _stores(config: DataConfig) -> tuple[dict[str, TokenStore], dict[str, TokenStore]]:
  return ({one.store: TokenStore.open(one.store) for one in config.train},
          {one.name: TokenStore.open(one.store) for one in config.valid})


def _from_source(config: DataConfig, cache_dir: Path, processes: int) -> tuple[dict[str, TokenStore], dict[str, TokenStore]]:
  source = open_source(config.source, cache_dir)
  tokenizer = load_tokenizer(config.tokenizer.path).sha256 if config.tokenizer.path else dataclasses.asdict(config.tokenizer)
  parts = [_FORMAT, source.fingerprint(), source.skip, config.valid_fraction, tokenizer]
  directory = cache_dir / 'data' / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
  with atomic_directory(directory) as folder:
    if folder:
      _build(folder, config, source, processes)
  return {source.description: TokenStore.open(directory / 'train')}, {'valid': TokenStore.open(directory / 'valid')}


def _build(folder: Path, config: DataConfig, source: Source, processes: int) -> None:
  train, valid = split_source(source, config.valid_fraction)
  if config.tokenizer.path:
    tokenizer = load_tokenizer(config.tokenizer.path)
  else:
    # Characters need every document that will ever be encoded, validation included; other kinds learn from a sample.
    tokenizer = train_tokenizer(config.tokenizer, documents(source) if config.tokenizer.kind == 'chars' else sample(train))
  for name, side, use in (('valid', valid, 'validation'), ('train', train, 'training')):
    write_store(folder / name, Recipe(side, tokenizer), processes=processes, title=f'tokenizing for {use}')


def _common_tokenizer(stores: list[TokenStore]) -> Tokenizer:
  for store in stores:
    if store.tokenizer_sha256 != stores[0].tokenizer_sha256:
      raise UserError('data: store', store.place, f'a store made with the tokenizer of {stores[0].place}, '
                      f'{stores[0].tokenizer_sha256[:12]}, and not {store.tokenizer_sha256[:12]}')
  return stores[0].tokenizer()


def _layout(store: TokenStore, config: DataConfig, cache_dir: Path) -> Layout:
  if config.rows == 'concat':
    return Windows(store, config.context)
  return Packed(store, plan(store, config.context, config.rows, cache_dir))


def _description(config: DataConfig, tokenizer: Tokenizer, layouts: dict[str, Layout], valid: dict[str, TokenStore]) -> str:
  sides = [f'train {name}: {_amounts(layout.store)}' + (f', {layout.plan.padding:.2%} padding' if isinstance(layout, Packed) else '')
           for name, layout in layouts.items()]
  sides += [f'{name}: {_amounts(store)}' for name, store in valid.items()]
  bytes_per_token = sum(store.bytes for store in valid.values()) / sum(store.tokens for store in valid.values())
  return (f'{"; ".join(sides)}; rows {config.rows}; tokenizer {tokenizer.kind}, {tokenizer.vocab_size:,} ids, '
          f'{bytes_per_token:.3f} bytes per token on valid')


def _amounts(store: TokenStore) -> str:
  return f'{counted(store.documents)}, {store.tokens:,} tokens, {store.bytes:,} bytes'
