"""Preparation: a data config becomes a tokenizer, token stores and row layouts, each made once and cached.

A workdir has copies of tokenizer and validation sets, with which its model is scored and sampled where the data is not, and the counts of
the words of classes, with which it is compared.
"""

import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import Config, DataConfig, Duration, UserError, duration_in_steps, in_unit_of_steps
from gptjax.data.examples import marked_example
from gptjax.data.folders import open_folder
from gptjax.data.mixture import Mixture
from gptjax.data.naive_bayes import NaiveBayes, classified_texts
from gptjax.data.progress import counted
from gptjax.data.rows import EvalRows, Layout, Packed, TrainRows, Windows
from gptjax.data.sources import Document, documents, open_source, sample, split_source
from gptjax.data.store import TokenStore
from gptjax.data.tokenizing import Recipe, write_store
from gptjax.data.tokenizers import HEADINGS, Tokenizer, load_tokenizer, train_tokenizer
from gptjax.files import atomic_directory, read_json

_FORMAT = 4  # To be incremented when the cached data or its meaning changes.
_MAX_COMPRESSED = 2**26  # bytes of text, which xz compresses in a minute


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
  """Tokenizer and validation sets of a run."""

  tokenizer: Tokenizer
  valid: dict[str, TokenStore]
  """validation sets by name"""
  tags: dict[str, list[str]]
  """names of the sets with each tag"""

  @property
  def labels(self) -> tuple[str, ...]:
    """Names of the classes of its texts, in order."""
    return next((store.labels for store in self.valid.values()), ())


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared(HeldOut):
  """Data of training and evaluation."""

  layouts: Sequence[Layout]
  """of the training stores"""
  fingerprint: str
  """hex digest of documents, splits and tokenizer"""
  description: str
  """one line: documents, tokens and bytes of each set, tokenizer, bytes per token"""
  valid_rows: Mapping[str, EvalRows] = dataclasses.field(default_factory=dict)
  """of the validation sets"""
  example: str = ''
  """the first example with its targets marked; empty if there are only documents"""


def prepare(config: DataConfig, cache_dir: Path, processes: int = 1) -> Prepared:
  """Opens the stores of a config, or makes them from its source and caches them.

  Stores made from a source are in `cache_dir/data`, packing plans in `cache_dir/plans`. Other processes that prepare the same wait.
  Raises a UserError if a source cannot be read or split, stores are damaged or have different tokenizers, or a side has less text than
  one row.
  """
  train, valid = _make_stores(config, cache_dir, processes) if not config.train else (
    {component.store: TokenStore.open(component.store) for component in config.train},
    {validation_set.name: TokenStore.open(validation_set.store) for validation_set in config.valid})
  first, *others = stores = [*train.values(), *valid.values()]
  for store in others:
    if store.tokenizer_sha256 != first.tokenizer_sha256:
      raise UserError('data: store', store.location, f'a store made with the tokenizer of {first.location}, '
                      f'{first.tokenizer_sha256[:12]}, and not {store.tokenizer_sha256[:12]}')
    if store.labels != first.labels:
      raise UserError('data: store', store.location, f'a store with the classes of {first.location}, {", ".join(first.labels) or "none"}, '
                      f'and not {", ".join(store.labels) or "none"}')
  for store in stores:
    store.check()
  _check_rows(config, train.values(), valid.values())
  # That of examples knows how conversations are written.
  tokenizer = next((found for store in stores if store.weighted and (found := store.tokenizer()).plain_chat), None) or first.tokenizer()
  tags = {tag: [one.name for one in config.valid if tag in one.tags] for each in config.valid for tag in each.tags}
  layouts = [Windows(store, config.context) if config.rows == 'concat' else
             Packed(store, config.context, config.rows, cache_dir, config.long_examples == 'cut') for store in train.values()]
  parts = [[store.sha256 for store in train.values()], {name: store.sha256 for name, store in valid.items()}, tags, tokenizer.sha256,
           *first.labels]
  return Prepared(tokenizer, valid, tags, layouts, hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16],
                  _description(config, tokenizer, dict(zip(train, layouts)), valid), eval_rows(config, valid, cache_dir),
                  next((marked_example(store, tokenizer) for store in train.values() if store.weighted), ''))


def eval_rows(config: DataConfig, stores: Mapping[str, TokenStore], cache_dir: Path) -> dict[str, EvalRows]:
  """The rows of validation sets."""
  return {name: EvalRows(store, config.context, config.isolate_documents, cache_dir, config.long_examples == 'cut')
          for name, store in stores.items()}


def train_rows(config: Config, data: Prepared) -> TrainRows:
  """The rows of a run. They depend on its data, its seed and, for phases given in steps, its batch size."""
  layouts, parts = data.layouts, config.data.train
  counts = [layout.count for layout in layouts]

  def first_row(start: Duration) -> int:
    # A step takes batch_size rows, so the number of steps at batch size 1 is a number of rows.
    each = config.objective.rows_per_example
    rows = duration_in_steps('data.phases: start', start, batch_size=1, context=config.data.context, rows_per_epoch=sum(counts) * each)
    return (rows * config.batch_size if in_unit_of_steps(start) else rows) // each

  mixture = Mixture(counts, [part.weight for part in parts] or [1.0],
                    [math.ceil(part.epochs * count) for part, count in zip(parts, counts)],
                    [(first_row(phase.start), phase.weights) for phase in config.data.phases])
  return TrainRows(layouts, mixture, config.data.context, config.seed, config.data.isolate_documents)


def _make_stores(config: DataConfig, cache_dir: Path, processes: int) -> tuple[dict[str, TokenStore], dict[str, TokenStore]]:
  source = open_source(config.source, cache_dir)
  tokenizer = load_tokenizer(config.tokenizer.path) if config.tokenizer.path else None
  parts = [_FORMAT, source.fingerprint(), source.skip, config.valid_fraction,
           tokenizer.sha256 if tokenizer else dataclasses.asdict(config.tokenizer)]
  directory = cache_dir / 'data' / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
  with atomic_directory(directory) as folder:
    if folder:
      train, valid = split_source(source, config.valid_fraction)
      # 'chars' needs every document that will be encoded, validation included.
      texts = documents(source) if config.tokenizer.kind == 'chars' else sample(train)
      if config.source.chat == 'plain':
        texts = itertools.chain(texts, [Document('headings', HEADINGS)])
      tokenizer = tokenizer or train_tokenizer(config.tokenizer, texts)
      tokenizer = tokenizer.for_chat(config.source.chat)
      for name, side, use in (('valid', valid, 'validation'), ('train', train, 'training')):
        write_store(folder / name, Recipe(side, tokenizer), processes=processes, title=f'tokenizing for {use}')
  return {source.description: TokenStore.open(directory / 'train')}, {'valid': TokenStore.open(directory / 'valid')}


def _check_rows(config: DataConfig, train: Collection[TokenStore], valid: Collection[TokenStore]) -> None:
  examples = [store for store in (*train, *valid) if store.weighted]
  for store in examples:
    if not store.targets:
      raise UserError('data', store.location, 'examples with targets: the weights of all its answers are 0')
  if examples:
    config.check_examples()
  present = {label for store in train for label, count in store.label_counts.items() if count}
  if len(present) == 1:
    raise UserError('data', next(iter(train)).location, f'texts of two classes or more: all texts to train on are {present.pop()!r}')
  # A row comes from one store; a validation set may be shorter than a row, but not all sets together.
  train_tokens, valid_tokens = max(store.tokens for store in train), sum(store.tokens for store in valid)
  if not examples and config.context > min(train_tokens, valid_tokens):
    raise UserError('data.context', config.context, f'{min(train_tokens, valid_tokens):,} or less: there are {train_tokens:,} tokens to '
                    f'train on and {valid_tokens:,} to validate on; or more text')


def _description(config: DataConfig, tokenizer: Tokenizer, layouts: dict[str, Layout], valid: dict[str, TokenStore]) -> str:
  def amounts(store: TokenStore, layout: Layout | None = None) -> str:
    words = f'{counted(store.documents)}, {store.tokens:,} tokens, {store.bytes:,} bytes'
    if store.labels:
      words += ', of which ' + ', '.join(f'{count:,} {label}' for label, count in store.label_counts.items())
    elif store.weighted:
      least, mean = store.manifest['examples']['least_targets'], store.targets / store.documents
      words += f', of which {store.targets:,.0f} tokens are targets ({least:,.0f} or more per example, {mean:,.1f} on average)'
    if isinstance(layout, Packed):
      words += f', {layout.padding:.2%} padding'
      long = ((layout.dropped, 'dropped'), (layout.cut, 'cut'))
      words += ''.join(f', {count:,} examples longer than the context {what}' for count, what in long if count)
    return words

  sets = [f'train {name}: {amounts(layout.store, layout)}' for name, layout in layouts.items()]
  sets += [f'{name}: {amounts(store)}' + (f' (held out: {words})' if (words := store.manifest.get('held_out')) else '')
           for name, store in valid.items()]
  bytes_per_token = sum(store.bytes for store in valid.values()) / sum(store.tokens for store in valid.values())
  return (f'{"; ".join(sets)}; rows {config.rows}; tokenizer {tokenizer.kind}, {tokenizer.vocab_size:,} ids, '
          f'{bytes_per_token:.3f} bytes per token on valid')


def export(prepared: Prepared, directory: Path, replace: bool = False) -> None:
  """Copies tokenizer and validation sets to a folder, with the counts of naive Bayes if texts have classes. Raises a UserError if it has
  those of other data, unless `replace` is set."""
  if (directory / 'identity.json').exists():
    found = _identity(directory)['fingerprint']
    if found == prepared.fingerprint:
      return
    if not replace:
      raise UserError('data', prepared.fingerprint, f'{found}, the fingerprint of the documents, split and tokenizer that '
                      f'{directory} was made from; another --workdir for other data')
  new, old = (directory.with_suffix(suffix) for suffix in ('.new', '.replaced'))
  for left in (new, old):  # by a killed process
    shutil.rmtree(left, ignore_errors=True)
  with atomic_directory(new, resumes=False) as folder:
    assert folder
    prepared.tokenizer.save(folder / 'tokenizer')
    for name, store in prepared.valid.items():
      store.verify()
      open_folder(store.location).copy(folder / 'valid' / name)
    if prepared.labels:
      stores = (layout.store for layout in prepared.layouts)
      texts = itertools.chain.from_iterable(classified_texts(store, prepared.tokenizer) for store in stores)
      NaiveBayes.fit(texts, len(prepared.labels)).save(folder)
    facts = {'fingerprint': prepared.fingerprint, 'valid': list(prepared.valid), 'tags': prepared.tags}
    (folder / 'identity.json').write_text(json.dumps(facts))
  if directory.exists():
    directory.rename(old)
    shutil.rmtree(old)
  new.rename(directory)


def open_held_out(directory: Path) -> HeldOut:
  """Opens what `export` wrote. Raises a UserError if there is nothing, or it is damaged."""
  if not (directory / 'identity.json').exists():
    raise UserError('--workdir', str(directory.parent), 'a folder that gptjax.train made')
  identity = _identity(directory)
  sets = {name: TokenStore.open(directory / 'valid' / name) for name in identity['valid']}
  return HeldOut(load_tokenizer(directory / 'tokenizer'), sets, identity['tags'])


def _identity(directory: Path) -> dict[str, Any]:
  found = read_json(directory / 'identity.json')
  strings = lambda values: isinstance(values, list) and all(isinstance(one, str) for one in values)
  match found:
    case {'fingerprint': str(), 'valid': valid, 'tags': dict(tags)} if strings(valid) and all(
        strings(names) and names and {*names} <= {*valid} for names in tags.values()):
      return found
  raise UserError(str(directory / 'identity.json'), found,
                  'the fingerprint, validation sets and tags of a run, as they were written; restore it')


def compression_baselines(tokenizer: Tokenizer, stores: Mapping[str, TokenStore]) -> dict[str, float]:
  """Bits per byte of 'gzip -9' and 'xz -9' on the documents of all stores, to compare with a model's; nothing above 64 MB."""
  total = sum(store.bytes for store in stores.values())
  if total > _MAX_COMPRESSED:
    return {}
  text_of = lambda ids: b''.join(map(tokenizer.pieces.__getitem__, ids.tolist()))
  data = b''.join(text_of(store.read([first], [min(100_000, store.tokens - first)]))
                  for store in stores.values() for first in range(0, store.tokens, 100_000))
  return {'gzip -9': 8 * len(gzip.compress(data, 9)) / total, 'xz -9': 8 * len(lzma.compress(data, preset=9)) / total}
