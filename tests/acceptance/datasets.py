"""Bars of data: every row the same everywhere, nothing lost, fast, in little memory, and complete after any kill."""

import collections
import contextlib
import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptjax.config import SourceConfig
from gptjax.data import (
  Document, Mixture, Packed, TokenStore, TrainRows, Windows, batches, cores, load_tokenizer, open_source)
from tests.acceptance.record import Result, bar, given, python, several, train

CONTEXT, BATCH = 1024, 64


def prepared(folder: Path, name: str, source: Path, *flags: str) -> TokenStore:
  """A store in GPT-2's ids, made by the command."""
  out = folder / name
  python('tools.prepare_data', f'--source={source}', f'--tokenizer={given("gpt2_bpe")}', f'--out={out}', *flags)
  return TokenStore.open(out)


def three(folder: Path) -> list[TokenStore]:
  """Books, their paragraphs and worked answers."""
  return [prepared(folder, 'books', given('books/train')),
          prepared(folder, 'paragraphs', given('books/train'), r'--separator=\n\n'),
          prepared(folder, 'gsm8k', given('gsm8k/train.jsonl'), r'--text={question}\n{answer}')]


def rows_of(layouts: list, seed: int = 0) -> TrainRows:
  """Rows of a mixture with weights 3, 2 and 1, or of one store."""
  return TrainRows(layouts, Mixture([layout.count for layout in layouts], [3.0, 2.0, 1.0][:len(layouts)]), CONTEXT, seed, True)


@bar
def same_rows(folder: Path) -> Result:
  stores = three(folder)
  parts = ', '.join(f'Component({store.location!r}, {weight})' for store, weight in zip(stores, (3, 2, 1)))
  (folder / 'recipe.py').write_text(
    'from gptjax.config import *\n\ndef get_config():\n'
    f'  return Config(data=DataConfig(train=({parts}), valid=(ValidationSet("v", {stores[2].location!r}),), rows="pack", '
    f'context={CONTEXT}), batch_size={BATCH})\n')
  reference = _feed(folder, 'one process', 1, '--steps=200')
  others = {
    '2 processes, no prefetch': _feed(folder, 'two', 2, '--steps=200', '--config.data.prefetch=0'),
    '4 processes, 5 ahead': _feed(folder, 'four', 4, '--steps=200', '--config.data.prefetch=5'),
    '2 workers': _feed(folder, 'workers', 1, '--steps=200', '--config.data.workers=2'),
    'restart at step 137': _feed(folder, 'restart', 2, '--steps=63', f'--first_row={137 * BATCH}'),
    'batch 16 from step 100': _feed(folder, 'batch', 1, '--steps=400', f'--first_row={100 * BATCH}', '--config.batch_size=16'),
  }
  assert sorted(reference) == list(range(200 * BATCH))
  wrong = {name: sum(reference[row] != digest for row, digest in found.items()) for name, found in others.items()}
  complete = all(len(others[name]) == 200 * BATCH for name in list(others)[:3])
  return Result('200 steps, packing and a 3-way mixture: global rows bit by bit those of 1 process with 8 devices',
                f'{len(reference):,} rows; different: ' + ', '.join(f'{name} {count}' for name, count in wrong.items()),
                complete and not any(wrong.values()),
                'python -m tools.launch.local --processes=4 --devices=2 -- python -m tools.feed --config=RECIPE --steps=200 ...')


def _feed(folder: Path, name: str, processes: int, *flags: str) -> dict[int, str]:
  out = folder / name
  several(processes, 8 // processes, 'tools.feed', f'--config={folder}/recipe.py', f'--out={out}', f'--cache_dir={folder}/cache', *flags)
  files = [Path(f'{out}.{process}') for process in range(processes)] if processes > 1 else [out]
  lines = [line.split() for file in files for line in file.read_text().splitlines()]
  assert len({row for row, _ in lines}) == len(lines)
  return {int(row): digest for row, digest in lines}


@bar
def seek(folder: Path) -> Result:
  stores = three(folder)
  rows = rows_of([Packed(store, CONTEXT, 'pack', folder / 'cache') for store in stores])
  for step in range(300):  # every block read and checked once
    rows.batch(np.random.default_rng(step).integers(0, 10**12, BATCH))
  spent: dict[int, list[float]] = {0: [], 10**9: []}
  for _ in range(31):
    for first in spent:
      start = time.perf_counter()
      feed = batches(rows, first * BATCH, BATCH, np.arange(BATCH), prefetch=0, workers=0)
      next(feed)
      spent[first].append(time.perf_counter() - start)
  near, far = (float(np.median(spent[first])) for first in spent)
  return Result('first batch at step 10^9 as fast as at step 0 (packing, mixture)',
                f'{far / near:.2f} times ({near * 1e3:.2f} and {far * 1e3:.2f} ms, medians of 31)', far / near <= 1.25,
                'python -m tests.acceptance --only=seek')


@bar
def coverage(folder: Path) -> Result:
  books, paragraphs, gsm8k = three(folder)
  packed = {store.location: Packed(store, CONTEXT, 'pack', folder / 'cache') for store in (paragraphs, gsm8k)}
  exact = {'concat': _covers(Windows(books, CONTEXT)),
           'pack': all(_covers(packed[store.location]) for store in (paragraphs, gsm8k))}
  split = sum(_split_documents(store, packed[store.location]) for store in (paragraphs, gsm8k))
  padding = {store.location: packed[store.location].padding for store in (gsm8k, paragraphs)}
  return Result('each token a target (concat: books) and an input (pack: gsm8k, paragraphs) exactly once per epoch; no document '
                'that fits is split; padding below 1.5 % on gsm8k and 0.1 % on paragraphs of books at 1,024',
                f'concat {exact["concat"]}, pack {exact["pack"]}, {split} split; padding {padding[gsm8k.location]:.2%} and '
                f'{padding[paragraphs.location]:.3%}', all(exact.values()) and not split and padding[gsm8k.location] < 0.015
                and padding[paragraphs.location] < 0.001, 'python -m tests.acceptance --only=coverage')


def _covers(layout: Windows | Packed) -> bool:
  """Whether an epoch has each position of the stream once as an input and once as a target."""
  store = layout.store
  positions = TokenStore(store.location, store.manifest | {'dtype': '<i8', 'separator': -1, 'end': -1})
  # The same layout over a stream of positions: every id that is read is its own position.
  def read(starts: np.ndarray, counts: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
    for start, count, place in zip(starts.tolist(), counts.tolist(), places.tolist()):
      out[place:place + count] = (start + np.arange(count)) % store.tokens
  positions.read = read
  layout.store = positions
  begins = np.append(store.starts(0, store.documents)[:-1], store.tokens)
  rows = rows_of([layout], seed=5)
  inputs, targets = np.zeros(store.tokens, np.int64), np.zeros(store.tokens, np.int64)
  for first in range(0, layout.count, 256):
    batch = rows.batch(layout.count + np.arange(first, min(first + 256, layout.count)))
    real = batch['mask'] > 0
    np.add.at(inputs, batch['tokens'][real], 1)
    # A separator, here -1, follows a piece that is not the last of its row: the id after it in the stream starts a document.
    separators = real & (batch['targets'] < 0)
    assert np.isin(batch['tokens'][separators] + 1, begins).all()
    found = np.where(separators, batch['tokens'] + 1, batch['targets'])
    np.add.at(targets, found[real] % store.tokens, 1)
  layout.store = store
  return bool((inputs == 1).all() and (targets == 1).all())


def _split_documents(store: TokenStore, packed: Packed) -> int:
  """Documents no longer than a row that lie in more than one piece."""
  starts = store.starts(0, store.documents)
  rows = np.arange(packed.count)
  places = np.sort(np.concatenate([packed.pieces(rows[first:first + 5000], rows)[0] for first in range(0, packed.count, 5000)]))
  pieces = np.diff(np.searchsorted(places, starts))
  return int((pieces[np.diff(starts) <= CONTEXT] != 1).sum())


@bar
def loader(folder: Path) -> Result:
  stores = three(folder)
  packed = [Packed(store, CONTEXT, 'pack', folder / 'cache') for store in stores]
  kinds = {'concat': rows_of([Windows(stores[0], CONTEXT)]), 'pack': rows_of([packed[2]]), 'concat of 3': rows_of(
    [Windows(store, CONTEXT) for store in stores]), 'pack of 3': rows_of(packed)}
  speeds = {}
  for name, rows in kinds.items():
    for _ in range(2):  # the second time the store is warm
      feed = batches(rows, 0, BATCH, np.arange(BATCH), prefetch=2, workers=0)
      start = time.perf_counter()
      for _ in itertools.islice(feed, 600):
        pass
      speeds[name] = 600 * BATCH * CONTEXT / (time.perf_counter() - start) / 1e6
  lines = train('default', folder / 'run', '--config.steps=150', '--config.eval.every=0')
  wait = float(np.mean([line['data_wait'] for line in lines if 'data_wait' in line][2:]))
  return Result('batches of 64 x 1,024 with segments, positions and masks, warm: concat at least 40 million tokens/s; in training, '
                'waiting for data below 1 % of a step',
                ', '.join(f'{name} {speed:.0f}' for name, speed in speeds.items()) + f' million tokens/s; waiting {wait:.3%}',
                speeds['concat'] >= 40 and wait < 0.01, 'python -m tests.acceptance --only=loader')


@bar
def prepare_speed(folder: Path) -> Result:
  import sentencepiece
  import tokenizers
  books = given('books/train')
  python('tools.train_tokenizer', f'--source={books}', '--vocab_size=32000', f'--out={folder}/tok')
  texts = [record.text for record in open_source(SourceConfig(str(books))) if isinstance(record, Document)]
  megabytes = sum(len(text.encode()) for text in texts) / 1e6
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(line for text in texts for line in text.split('\n') if line), model_prefix=str(folder / 'plain'),
    vocab_size=32000, model_type='bpe', byte_fallback=True, max_sentence_length=2**20, input_sentence_size=200_000,
    shuffle_input_sentence=True, minloglevel=2)
  plain = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'plain.model'))
  bpe = given('gpt2_bpe')
  gpt2 = load_tokenizer(bpe)._encoding
  hugging_face = tokenizers.ByteLevelBPETokenizer(str(bpe / 'encoder.json'), str(bpe / 'vocab.bpe'))
  processes = cores()
  processor: Callable[[str], object] = plain.encode
  contestants: dict[str, Callable[[], object]] = {
    'ours': lambda: shutil.rmtree(folder / 'out', ignore_errors=True) or python(
      'tools.prepare_data', f'--source={books}', f'--tokenizer={folder}/tok', f'--out={folder}/out', f'--processes={processes}'),
    'sentencepiece': lambda: [processor(text) for text in texts],
    'tokenizers': lambda: hugging_face.encode_batch(texts),
    'tiktoken': lambda: gpt2.encode_ordinary_batch(texts, num_threads=processes),
  }
  speed = {name: [] for name in contestants}
  for _ in range(3):
    for name, run in contestants.items():
      start = time.perf_counter()
      run()
      speed[name].append(megabytes / (time.perf_counter() - start))
  best = {name: max(found) for name, found in speed.items()}
  least = 0.85 * processes * best['sentencepiece']
  return Result(f'prepare_data on books/train, 32k ids, {processes} cores: at least 0.85 times plain sentencepiece in a loop, times cores',
                f'{best["ours"]:.1f} MB/s with start-up; needed {least:.1f} (sentencepiece {best["sentencepiece"]:.1f} on one core); '
                f'GPT-2: tokenizers {best["tokenizers"]:.1f}, tiktoken {best["tiktoken"]:.1f}, encoding alone',
                best['ours'] >= least, 'python -m tools.prepare_data --source=books/train --tokenizer=TOK --out=OUT')


@bar
def memory(folder: Path) -> Result:
  corpus = folder / 'corpus.jsonl'
  _synthesize(corpus, 5 * 10**9)
  python('tools.train_tokenizer', f'--source={corpus}', '--vocab_size=8000', '--characters=20000000', f'--out={folder}/tok')
  command = [sys.executable, '-m', 'tools.prepare_data', f'--source={corpus}', f'--tokenizer={folder}/tok', f'--out={folder}/store',
             '--deduplicate', '--max_repeated_lines=0.9']
  start = time.monotonic()
  with subprocess.Popen(command) as process:
    preparing = _peak_of_tree(process)
  assert process.returncode == 0
  seconds = time.monotonic() - start
  store = TokenStore.open(folder / 'store')
  code = (f'import resource; from tests.acceptance.datasets import *; store = TokenStore.open({store.location!r})\n'
          f'rows = rows_of([Packed(store, CONTEXT, "pack", Path({str(folder)!r}) / "cache")])\n'
          'feed = batches(rows, 0, BATCH, np.arange(BATCH), prefetch=2, workers=0)\n'
          f'for _ in range({-(-store.tokens // (BATCH * CONTEXT))}): next(feed)\n'
          'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)')
  loading = int(subprocess.run([sys.executable, '-c', code], check=True, stdout=subprocess.PIPE, text=True).stdout)
  corpus.unlink()
  return Result('a synthetic corpus of 5 GB: preparing (deduplicated, filtered) and loading an epoch packed stay under 1.5 GB per process',
                f'preparing {preparing / 1e9:.2f} GB at most ({seconds:.0f} s, {store.tokens:,} tokens), loading {loading / 1e9:.2f} GB',
                max(preparing, loading) < 1.5e9, 'python -m tools.prepare_data --source=corpus.jsonl --deduplicate ...')


def _synthesize(path: Path, size: int) -> None:
  """Writes documents of made-up words, each with a number of its own, as JSON lines."""
  rng = np.random.default_rng(0)
  letters = np.array(list('etaoinshrdlucmfwypvbgkjqxz'))
  words = [''.join(rng.choice(letters, rng.integers(2, 10))) for _ in range(30_000)]
  sentences = [' '.join(words[k] for k in rng.zipf(1.3, 12) % len(words)) for _ in range(60_000)]
  with path.open('w') as file:
    number = written = 0
    while written < size:
      chosen = rng.integers(0, len(sentences), (2000, 20))
      texts = ['. '.join([sentences[k] for k in row[:rng.integers(1, 20)]]) for row in chosen]
      lines = [f'{{"text": "{number + i} {text}"}}\n' for i, text in enumerate(texts)]
      number += len(lines)
      written += sum(map(len, lines))
      file.writelines(lines)


def _peak_of_tree(process: subprocess.Popen) -> int:
  """Most bytes that any one process of a tree ever had in memory (VmHWM), until the first ends."""
  peak = 0
  while process.poll() is None:
    for pid in _tree(process.pid):
      with contextlib.suppress(OSError, StopIteration):
        line = next(line for line in Path(f'/proc/{pid}/status').read_text().splitlines() if line.startswith('VmHWM'))
        peak = max(peak, 1024 * int(line.split()[1]))
    time.sleep(0.2)
  return peak


def _tree(pid: int) -> Iterator[int]:
  yield pid
  with contextlib.suppress(OSError):
    for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
      yield from _tree(int(child))


@bar
def kills(folder: Path) -> Result:
  arguments = [sys.executable, '-m', 'tools.prepare_data', f'--source={given("books/train")}', r'--separator=\n\n', '--deduplicate',
               f'--tokenizer={given("gpt2_bpe")}', '--shard_tokens=1000000']
  start = time.monotonic()
  subprocess.run([*arguments, f'--out={folder}/straight'], check=True, stdout=subprocess.DEVNULL)
  seconds = time.monotonic() - start
  expected, rng, moments = _bytes(folder / 'straight'), random.Random(0), []
  equal = 0
  for number in range(20):
    out = folder / f'killed{number}'
    process = subprocess.Popen([*arguments, f'--out={out}'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(rng.uniform(0.05, 0.95) * seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    moments.append(len(list(out.with_name(f'{out.name}.building').glob('*.shard'))))
    subprocess.run([*arguments, f'--out={out}'], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    equal += _bytes(out) == expected and not list(folder.glob(f'{out.name}.*'))
    shutil.rmtree(out)
  return Result('prepare_data killed (-9) at 20 random moments: the rerun finishes, the store is byte-identical to an undisturbed one',
                f'{equal} of 20 identical; finished shards at the kill: {", ".join(map(str, moments))} of '
                f'{TokenStore.open(folder / "straight").manifest["shards"]}', equal == 20, 'python -m tools.prepare_data ...')


def _bytes(folder: Path) -> dict[str, bytes]:
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@bar
def gpt2_ids(folder: Path) -> Result:
  import tokenizers
  from transformers import GPT2TokenizerFast
  bpe = given('gpt2_bpe')
  ours = load_tokenizer(bpe)
  references = {'tokenizers': tokenizers.ByteLevelBPETokenizer(str(bpe / 'encoder.json'), str(bpe / 'vocab.bpe'))}
  (folder / 'vocab.json').write_text((bpe / 'encoder.json').read_text())
  (folder / 'merges.txt').write_text((bpe / 'vocab.bpe').read_text())
  references['transformers'] = GPT2TokenizerFast.from_pretrained(str(folder))
  files = [path for path in sorted(given('.').rglob('*')) if path.is_file() and path.parent != bpe]
  ids, different = 0, collections.Counter()
  for path in files:
    text = path.read_bytes().decode(errors='replace')
    found = ours.encode(text).tolist()
    ids += len(found)
    different['decoded'] += ours.decode(found) != text
    different['tokenizers'] += references['tokenizers'].encode(text).ids != found
    different['transformers'] += references['transformers'](text, add_special_tokens=False)['input_ids'] != found
  return Result("GPT-2's ids of all text in --data equal those of tokenizers and transformers, and decode to the text",
                f'{len(files)} files, {ids:,} ids; different: ' + ', '.join(f'{name} {count}' for name, count in different.items()),
                not any(different.values()) and len(files) > 100, 'python -m tests.acceptance --only=gpt2_ids')


@bar
def bad_input(folder: Path) -> Result:
  mistakes = _mistakes(folder)
  wrong = []
  before = _listing(folder)
  for name, (arguments, expected) in mistakes.items():
    done = subprocess.run([sys.executable, '-m', *arguments], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    # A run that meets damage on its way keeps what it had; nothing in it is half-written.
    left = {path for path in _listing(folder) ^ before if 'in training' not in name or 'partial' in path[0]}
    shutil.rmtree(folder / 'run', ignore_errors=True)
    if not (done.returncode == 2 and len(errors) == 1 and done.stderr.rstrip().endswith(errors[0]) and expected in errors[0]
            and 'Traceback' not in done.stderr and not left):
      wrong.append(f'{name}: {done.returncode} {done.stderr[-300:]!r} {left}')
    print(f'{name}: {errors[0] if errors else done.stderr[-200:]}', file=sys.stderr)
  return Result('mistakes: one error line that names it, exit 2, nothing left behind', f'{len(mistakes) - len(wrong)} of {len(mistakes)}: '
                + ', '.join(mistakes) + ''.join(f'; wrong: {one}' for one in wrong), not wrong,
                'python -m tests.acceptance --only=bad_input')


def _listing(folder: Path) -> set[tuple[str, int]]:
  return {(str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob('*') if 'cache' not in path.parts}


def _mistakes(folder: Path) -> dict[str, tuple[list[str], str]]:
  """Commands with a mistake each, and what their error must say."""
  good = [f'{{"text": "line {i}, some words"}}\n' for i in range(2000)]
  (folder / 'good.jsonl').write_text(''.join(good))
  (folder / 'empty').mkdir()
  (folder / 'empty/a.txt').touch()
  (folder / 'binary.txt').write_bytes(bytes(range(256)) * 100)
  (folder / 'broken.jsonl').write_bytes(''.join(good[:700]).encode() + b'{"text": "\xff\xfe"}\n' + ''.join(good[700:]).encode())
  (folder / 'surrogate.jsonl').write_text(''.join(good[:5]) + '{"text": "\\ud800"}\n')
  (folder / 'text.txt').write_text('some text of a few words\n' * 200)
  (folder / 'table.parquet').write_bytes(b'PAR1 and nothing more')
  base = ['tools.prepare_data', f'--out={folder}/out']
  make = lambda name, *flags: python('tools.prepare_data', f'--source={folder}/good.jsonl', f'--out={folder}/{name}', *flags)
  make('store', '--tokenizer=bytes')
  make('gpt2', f'--tokenizer={given("gpt2_bpe")}')
  for name in ('truncated', 'flipped', 'gone', 'manifest'):
    shutil.copytree(folder / 'store', folder / name)
    shard = folder / name / '00000.shard'
    undamaged = shard.read_bytes()
    match name:
      case 'truncated':
        shard.write_bytes(undamaged[:-100])
      case 'flipped':
        shard.write_bytes(bytes([undamaged[0] ^ 4]) + undamaged[1:])
      case 'gone':
        shard.unlink()
      case 'manifest':
        manifest = folder / name / 'manifest.json'
        manifest.write_text(manifest.read_text().replace('"bytes": ', '"bytes": 1'))
  run = lambda train, valid='store', *flags: [
    'gptjax.train', '--config=configs/default.py', f'--workdir={folder}/run', '--config.steps=3',
    '--config.optimizer.warmup=1', '--config.model.layers=1',
    f'--config.data.train=[{{"store": "{folder}/{train}"}}]',
    f'--config.data.valid=[{{"name": "v", "store": "{folder}/{valid}"}}]', f'--cache_dir={folder}/cache', *flags]
  bytes_of = lambda name, *flags: [*base, f'--source={folder}/{name}', '--tokenizer=bytes', *flags]
  return {
    'empty corpus': (bytes_of('empty'), 'empty'),
    'no such corpus': (bytes_of('god.jsonl'), 'did you mean'),
    'binary file': (bytes_of('binary.txt'), 'binary file'),
    'wrong field': (bytes_of('good.jsonl', '--text=txt'), 'did you mean text'),
    'broken UTF-8': (bytes_of('broken.jsonl'), 'broken.jsonl:701'),
    'lone surrogate': (bytes_of('surrogate.jsonl'), 'surrogate.jsonl:6'),
    'more malformed than allowed': (bytes_of('broken.jsonl', '--skip=0.0001'), 'skip'),
    'truncated Parquet': (bytes_of('table.parquet'), 'table.parquet'),
    'everything filtered': (bytes_of('good.jsonl', '--min_chars=9999'), 'min_chars'),
    'corrupted manifest': (run('manifest'), 'manifest.json'),
    'no tokenizer': ([*base, f'--source={folder}/good.jsonl', f'--tokenizer={folder}'], 'tokenizer'),
    'another store in its place': (['tools.prepare_data', f'--source={folder}/text.txt', '--tokenizer=bytes', f'--out={folder}/store'],
                                   '--out'),
    'truncated shard': (run('truncated'), 'truncated/00000.shard'),
    'missing shard': (run('gone'), 'gone/00000.shard'),
    'flipped byte in training': (run('flipped'), 'flipped/00000.shard'),
    'flipped byte in validation': (run('store', 'flipped'), 'flipped/00000.shard'),
    'flipped byte, verified': (['tools.inspect_data', f'--store={folder}/flipped', '--verify'], 'flipped/00000.shard'),
    'wrong tokenizer for a store': (run('store', 'gpt2'), 'tokenizer'),
    "vocabulary larger than the model's": (run('store', 'store', '--config.model.vocab_size=200'), 'model.vocab_size'),
    'no store': (run('stor'), 'stor'),
    'weights for two of three': (run('store', 'store', '--config.data.phases=[{"start": 5, "weights": [1, 2]}]'), 'data.phases'),
  }
