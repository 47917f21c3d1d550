"""Shows a token store, or the batches of a run.

A store:  python -m tools.inspect_data --store=FOLDER [--documents=3] [--verify]
A run:    python -m tools.inspect_data --config=configs/NAME.py [--config.FIELD=VALUE ...] [--step=1]
          python -m tools.inspect_data --workdir=FOLDER --step=1000

For a store it prints facts, documents and a histogram of their lengths; for a run, the decoded batch of a step with each segment in a
different colour, and the actual fractions of a mixture's components. Steps are counted from 1, as in metrics.jsonl and bad_steps.jsonl.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptjax import config as configs
from gptjax.cache import cache_dir
from gptjax.config import Config, FaultsConfig, UserError
from gptjax.data import Batch, Tokenizer, TokenStore, TrainRows, cores, prepare, train_rows
from gptjax.data import progress
from gptjax.data.examples import marked_example
from gptjax.data.progress import counted
from gptjax.files import expanded, save_figure, writable

_STORE = flags.DEFINE_string('store', None, 'folder or URL of a token store')
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run whose config to use')
_DOCUMENTS = flags.DEFINE_integer('documents', 3, "documents of a store to show, evenly spaced", lower_bound=0)
_CHARACTERS = flags.DEFINE_integer('characters', 300, 'characters of each document to show', lower_bound=1)
_VERIFY = flags.DEFINE_bool('verify', False, 'read all of the store and compare it with its checksums')
_STEP = flags.DEFINE_integer('step', 1, 'step whose batch to show; the first is 1', lower_bound=1)
_ROWS = flags.DEFINE_integer('rows', 4, 'rows of the batch to show; 0: all', lower_bound=0)
_STEPS = flags.DEFINE_integer('steps', 1000, "steps, from the first on, over which a mixture's rows are counted", lower_bound=1)
_PLOT = flags.DEFINE_string('plot', None, 'PNG file for plots of the same data')

COLORS = ('cyan', 'yellow', 'green', 'magenta', 'blue', 'red')
"""Colors of successive segments."""

_MAX_LENGTHS = 1_000_000


def main(config: Config | None) -> None:
  if _PLOT.value:
    if not _PLOT.value.endswith('.png'):
      raise UserError('--plot', _PLOT.value, 'a file that ends in .png')
    writable(_PLOT.value, '--plot')
  console = progress.console(markup=True)
  if _STORE.value:
    if config or _WORKDIR.value:
      raise UserError('--store', _STORE.value, 'one of --store, --workdir and --config')
    store = TokenStore.open(_STORE.value)
    store.check()
    _show_store(console, store)
    if _PLOT.value:
      _plot({Path(_STORE.value).name: store}, None, None)
    return
  rows, tokenizer, config = _rows(config)
  batch = rows.batch(_batch_rows(config.batch_size))
  _show_batch(console, batch, tokenizer, any(layout.store.weighted for layout in rows.layouts))
  shares = _shares(rows, config)
  _show_shares(console, shares, config)
  if _PLOT.value:
    _plot({name: layout.store for name, layout in zip(shares, rows.layouts)}, batch, shares)


def _rows(config: Config | None) -> tuple[TrainRows, Tokenizer, Config]:
  if not config:
    if not _WORKDIR.value:
      raise UserError('--store', None, 'a token store; or --config or --workdir for the data of a run')
    config = configs.read_config(expanded(_WORKDIR.value))
  config = configs.override(config, {'data.isolate_documents': True})  # segments are always shown
  data = prepare(config.data, cache_dir(), cores())
  print(data.description, file=sys.stderr)
  return train_rows(config, data), data.tokenizer, config


def _batch_rows(size: int) -> np.ndarray:
  """The rows of the step, without the batches that the run of --workdir skipped."""
  if not _WORKDIR.value:
    return np.arange((_STEP.value - 1) * size, _STEP.value * size)
  from gptjax.training.guard import BadSteps  # imports JAX, which takes seconds
  steps = BadSteps(FaultsConfig(), expanded(_WORKDIR.value), writes=True)
  for bad in [bad for bad in steps.found if bad.step == _STEP.value][-1:]:
    print(bad, file=sys.stderr)
  return np.arange(*steps.rows_of(_STEP.value, size))


def _show_store(console: Console, store: TokenStore) -> None:
  manifest = store.manifest
  facts = {
    'documents': f'{store.documents:,}', 'tokens': f'{store.tokens:,}', 'bytes': f'{store.bytes:,}',
    'bytes per token': f'{store.bytes / store.tokens:.3f}', 'ids': f'{store.vocab_size:,}, as {store.dtype}',
    'shards': f'{manifest["shards"]:,}', 'source': manifest.get('source'), 'malformed': manifest.get('malformed'),
    'dropped': ', '.join(f'{reason} {count:,}' for reason, count in manifest.get('dropped', {}).items()) or 'none',
    'tokenizer': store.tokenizer_sha256[:12],
  }
  for name, value in facts.items():
    console.print(f'{name:>16}  {value}', markup=False)
  _show_lengths(console, lengths(store))
  tokenizer = store.tokenizer()
  for number in np.unique(np.linspace(0, store.documents - 1, _DOCUMENTS.value).astype(int)):
    start, stop = store.starts(int(number), int(number) + 1)
    text = marked_example(store, tokenizer, int(number)) if store.weighted else (
      tokenizer.decode(store.read([start + 1], [min(stop - start - 1, 4 * _CHARACTERS.value)]).tolist()))
    size = f'example {number:,}[/bold], {stop - start:,} tokens' if store.weighted else (
      f'document {number:,}[/bold], {stop - start - 1:,} tokens and its separator')
    console.print(f'\n[bold]{size}')
    console.print(Text(text[:_CHARACTERS.value] + ('…' if len(text) > _CHARACTERS.value else '')))
  if _VERIFY.value:
    store.verify()
    console.print(f'\nverified: all {manifest["shards"]:,} shards are undamaged')


def lengths(store: TokenStore) -> np.ndarray:
  """Tokens of documents [n], separators included: of all, or of a million in 64 evenly spaced stretches of the store."""
  if store.documents <= _MAX_LENGTHS:
    return np.diff(store.starts(0, store.documents))
  stretch = _MAX_LENGTHS // 64
  firsts = np.linspace(0, store.documents - stretch, 64).astype(int).tolist()
  return np.concatenate([np.diff(store.starts(first, first + stretch)) for first in firsts])


def _show_lengths(console: Console, found: np.ndarray) -> None:
  console.print(f'\n[bold]tokens per document[/bold]  mean {found.mean():,.1f}, median {np.median(found):,.0f}, longest {found.max():,}')
  edges = 2 ** np.arange(0, int(found.max()).bit_length() + 1)
  counts, _ = np.histogram(found, edges)
  filled = np.flatnonzero(counts)
  for k in range(filled[0], filled[-1] + 1):
    bar = '█' * -(-40 * counts[k] // counts.max())
    console.print(f'{edges[k]:>12,} to {edges[k + 1] - 1:<12,} {bar} {counts[k]:,}', markup=False)


def _show_batch(console: Console, batch: Batch, tokenizer: Tokenizer, has_examples: bool) -> None:
  count = _ROWS.value or len(batch['tokens'])
  console.print('Each segment has a colour; ▏ marks the start of a document; padding has mask 0.'
                + ' Targets are underlined.' * has_examples)
  for number in range(min(count, len(batch['tokens']))):
    tokens, segments, mask = (batch[name][number] for name in ('tokens', 'segments', 'mask'))
    console.print(f'\n[bold]step {_STEP.value:,}, row {number}[/bold]  {segments.max()} segments, {int(mask.sum()):,} targets, '
                  f'{int((segments == 0).sum()):,} padding')
    targets = np.append(False, mask[:-1] > 0) & np.append(False, segments[1:] == segments[:-1]) & has_examples
    console.print(_colored(tokens.tolist(), segments.tolist(), targets.tolist(), tokenizer))


def _colored(tokens: list[int], segments: list[int], targets: list[bool], tokenizer: Tokenizer) -> Text:
  text, last = Text(), 0
  for (segment, is_target), group in itertools.groupby(zip(tokens, segments, targets), key=lambda one: one[1:]):
    ids = [token for token, *_ in group]
    if not segment:
      text.append(f'▏{len(ids):,} padding', 'dim')
      continue
    start = '▏' if segment != last and ids[0] == tokenizer.bos_id else ''
    text.append(start + tokenizer.decode(ids), COLORS[segment % len(COLORS)] + ' underline' * is_target)
    last = segment
  return text


@dataclasses.dataclass(frozen=True)
class Share:
  """A component's fraction of a run's rows."""

  weight: float
  """normalized weight at the start"""
  actual: np.ndarray
  """[points] fraction of the rows before each of some points"""
  rows: int
  """rows taken"""
  passes: float
  """passes over the component"""


def _shares(rows: TrainRows, config: Config) -> dict[str, Share]:
  taken = _STEPS.value * config.batch_size
  if rows.mixture.rows is not None:
    taken = min(taken, rows.mixture.rows)
  ends = np.unique(np.linspace(0, taken, 201).astype(int))[1:]
  counts = np.zeros((len(rows.layouts), len(ends)), np.int64)
  for k, (first, stop) in enumerate(itertools.pairwise([0, *ends])):
    components, _ = rows.mixture.locate(np.arange(first, stop))
    counts[:, k] = np.bincount(components, minlength=len(rows.layouts))
  total = np.cumsum(counts, axis=1)
  weights = np.array([part.weight for part in config.data.train])
  if not weights.any():
    weights = np.array([layout.count for layout in rows.layouts], float)
  names = [part.store for part in config.data.train] or [config.data.source.path or 'the embedded corpus']
  return {name: Share(weight / weights.sum(), total[k] / ends, int(total[k, -1]), total[k, -1] / rows.layouts[k].count)
          for k, (name, weight) in enumerate(zip(names, weights))}


def _show_shares(console: Console, shares: dict[str, Share], config: Config) -> None:
  table = Table(title=f'rows of steps 1 to {_STEPS.value:,}, {config.batch_size} per step', title_justify='left')
  for column in ('component', 'weight', 'actual', 'rows', 'passes'):
    table.add_column(column, justify='left' if column == 'component' else 'right')
  for name, share in shares.items():
    table.add_row(Text(name), f'{share.weight:.4f}', f'{share.actual[-1]:.4f}', f'{share.rows:,}', f'{share.passes:.3f}')
  console.print()
  console.print(table)


def _plot(stores: dict[str, TokenStore], batch: Batch | None, shares: dict[str, Share] | None) -> None:
  import matplotlib
  matplotlib.use('Agg')
  matplotlib.rcParams['text.parse_math'] = False  # names of stores are no formulas
  import matplotlib.pyplot as plt
  panels = 1 + (2 if batch is not None else 0)
  figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 4.5), constrained_layout=True, squeeze=False)
  histogram, *others = axes[0]
  for name, store in stores.items():
    found = lengths(store)
    edges = np.geomspace(1, max(found.max(), 2), 50)
    histogram.hist(found, edges, histtype='step', label=f'{name}: {counted(store.documents)}', weights=np.full(len(found), 1 / len(found)))
  histogram.set(xscale='log', xlabel='tokens per document', ylabel='fraction of documents', title='Lengths')
  histogram.xaxis.set_major_formatter('{x:,g}')  # the default labels are formulas
  histogram.legend(loc='upper left', fontsize='small')
  if batch is not None and shares is not None:
    shown, mixed = others
    segments = np.where(batch['segments'] > 0, (batch['segments'] - 1) % 6 + 1, 0)
    colors = matplotlib.colors.ListedColormap(['white', *plt.get_cmap('tab10').colors[:6]])
    shown.imshow(segments, cmap=colors, vmin=0, vmax=6, aspect='auto', interpolation='nearest')
    padding = (batch['segments'] == 0).mean()
    shown.set(xlabel='position in the row', ylabel='row', title=f'Segments of step {_STEP.value:,}; white: padding, {padding:.2%}')
    for name, share in shares.items():
      mixed.plot(np.linspace(0, _STEPS.value, len(share.actual) + 1)[1:], share.actual, label=f'{name}, {share.passes:.2f} passes')
    mixed.set(xlabel='step', ylabel='fraction of all rows so far', title='Mixture', ylim=(0, 1.02))
    mixed.legend(loc='best', fontsize='small')
  save_figure(figure, expanded(_PLOT.value), dpi=120)
  plt.close(figure)
  print(f'plot: {_PLOT.value}', file=sys.stderr)


if __name__ == '__main__':
  configs.run(main, needs_config=None)
