"""Makes a token store: python -m tools.prepare_data --source=PATH --tokenizer=FOLDER --out=FOLDER

The store can be used for training (data.train) and validation (data.valid), and shown by tools.inspect_data. An interrupted command
resumes after the last finished shard when it is repeated. Equal arguments give equal stores, with any number of processes.
"""

import dataclasses
from collections.abc import Iterator

from absl import flags

from gptjax import config as configs
from gptjax.cache import cache_dir
from gptjax.config import UserError
from gptjax.data import (
  Contamination, Document, Filters, Recipe, Source, TokenStore, cores, load_tokenizer, open_source, split_source, write_store)
from gptjax.data.examples import marked_example
from gptjax.data.sources import documents
from gptjax.data.store import MANIFEST
from gptjax.data.progress import announce, counted
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.files import expanded
from . import source_flags

_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, "folder of a tokenizer: tools.train_tokenizer's, or a published model's; or 'bytes'", required=True)
_OUT = flags.DEFINE_string('out', None, 'folder of the store; it appears when the store is complete', required=True)
_PROCESSES = flags.DEFINE_integer('processes', 0, 'processes that tokenize; 0: one per core', lower_bound=0)
_SIDE = flags.DEFINE_enum('side', 'all', ['all', 'train', 'valid'], 'documents to use: all, or one side of a split by --valid_fraction')
_FRACTION = flags.DEFINE_float('valid_fraction', 0.01, 'fraction of the text on the side of validation')
_DEDUPLICATE = flags.DEFINE_bool('deduplicate', False, 'drop documents whose text occurred before')
_DECONTAMINATE = flags.DEFINE_multi_string(
  'decontaminate', [], 'NAME=SOURCE, a path or JSON as in --source, or NAME=STORE: drop documents that have 13 consecutive words in '
  'common with one of these evaluation documents')
_SHARD = flags.DEFINE_integer('shard_tokens', 2**28, 'tokens per shard, approximately', lower_bound=1)
for _field in dataclasses.fields(Filters):
  _define = flags.DEFINE_integer if isinstance(_field.default, int) else flags.DEFINE_float
  _define(_field.name, _field.default, configs.docstrings(Filters)[_field.name])


def main(_) -> None:
  if '://' in _OUT.value or expanded(_OUT.value).is_file():
    raise UserError('--out', _OUT.value, 'a folder on this machine')
  out = expanded(_OUT.value)
  tokenizer = ByteTokenizer() if _TOKENIZER.value == 'bytes' else load_tokenizer(expanded(_TOKENIZER.value))
  tokenizer = tokenizer.for_chat(source_flags.sources()[0].chat)
  recipe = Recipe(_source(), tokenizer, Filters(**{field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(Filters)}),
                  _contamination(), _DEDUPLICATE.value, _SHARD.value)
  if out.exists():
    if not (out / MANIFEST).exists():
      raise UserError('--out', str(out), 'a new folder, or the store of the same command; this one has other contents')
    announce(f'{out} exists already')
  announce(f'reading {recipe.source.description}')
  processes = _PROCESSES.value or cores()
  try:
    store = write_store(out, recipe, processes=processes)
  except KeyboardInterrupt as interrupt:
    interrupt.args = (f'{interrupt}; the same command resumes after the finished shards in {out}.building',)
    raise
  manifest = store.manifest
  print(f'{out}: {counted(store.documents)}, {store.tokens:,} tokens, {store.bytes:,} bytes, '
        f'{store.bytes / store.tokens:.3f} bytes per token')
  if store.weighted:
    print(f'targets: {store.targets:,.0f} tokens, {manifest["examples"]["least_targets"]:,.0f} or more per example; the first one, with '
          f'its targets in ⟦⟧:\n{marked_example(store, tokenizer)}')
  if manifest.get('held_out'):
    print(f'held out for validation: {manifest["held_out"]}')
  none_found = {f'decontamination, {name}': 0 for name in manifest['decontaminated']}
  for reason, count in (none_found | manifest['dropped']).items():
    print(f'dropped by {reason}: {counted(count)}')
  if manifest['malformed']:
    print(f'malformed: {manifest["malformed"]:,} of {manifest["records"]:,} records')


def _source() -> Source:
  chosen, *others = source_flags.sources()
  if others:
    raise UserError('--source', others[0].path, 'one source; mixtures are made of stores, in data.train')
  source = open_source(chosen, cache_dir())
  if _SIDE.value == 'all':
    if flags.FLAGS['valid_fraction'].present:
      raise UserError('--side', 'all', 'train or valid, with --valid_fraction')
    return source
  if not 0 < _FRACTION.value < 1:
    raise UserError('--valid_fraction', _FRACTION.value, 'above 0 and below 1')
  return split_source(source, _FRACTION.value)[_SIDE.value == 'valid']


def _contamination() -> Contamination | None:
  sets: dict[str, list[Document]] = {}
  for text in _DECONTAMINATE.value:
    name, _, place = text.partition('=')
    if not name or not place or name in sets:
      raise UserError('--decontaminate', text, 'NAME=SOURCE or NAME=STORE, as gsm8k=test.jsonl, each name once')
    sets[name] = list(_evaluation_documents(place))
  if not sets:
    return None
  contamination = Contamination(sets)
  for name, skipped in contamination.skipped.items():
    if skipped == len(sets[name]):
      raise UserError('--decontaminate', name, f'a set with documents of 8 words or more; it has {counted(skipped)}')
    if skipped:
      announce(f'{name}: {counted(skipped)} of {len(sets[name]):,} too short to be matched')
  return contamination


def _evaluation_documents(place: str) -> Iterator[Document]:
  if not place.startswith('{') and '://' not in place and (expanded(place) / MANIFEST).exists():
    store = TokenStore.open(place)
    tokenizer, starts = store.tokenizer(), store.starts(0, store.documents)
    return (Document(str(number), tokenizer.decode(store.read([start], [stop - start]).tolist()))
            for number, (start, stop) in enumerate(zip(starts, starts[1:])))
  return documents(open_source(source_flags.source(place, '--decontaminate', {})))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
