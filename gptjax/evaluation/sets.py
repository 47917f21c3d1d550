"""The sets of documents to score: held-out sets of the run, token stores, and files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gptjax.config import SourceConfig, UserError
from gptjax.data import HeldOut, Recipe, TokenStore, cores, open_source, write_store
from gptjax.data.store import MANIFEST
from gptjax.evaluation.results import ALL_SETS
from gptjax.files import expanded
from gptjax.distributed import is_primary, broadcast


def choose_sets(wanted: Sequence[str] | None, held_out: HeldOut, source: SourceConfig,
                cache_dir: Path) -> tuple[dict[str, TokenStore], dict[str, list[str]]]:
  """The token stores that --sets selects, and the tags whose sets are all among them.

  Args:
    wanted: NAME, one of the run's own sets; NAME=STORE, a folder or URL that tools.prepare_data made with the run's tokenizer; or
      NAME=PATH, documents of any source, which are tokenized into the cache. None: all of the run's own sets.
    held_out: of the run.
    source: of the run; where it has examples, PATH has such examples too.
    cache_dir: documents are tokenized into `cache_dir/data`.

  Raises:
    UserError: an unknown or repeated name, a store of another tokenizer, or documents that cannot be read.
  """
  if wanted is None:
    return held_out.valid, held_out.tags
  chosen: dict[str, TokenStore] = {}
  for text in wanted:
    name, given, path = text.partition('=')
    if not name or name in chosen or (given and not path):
      raise UserError('--sets', text, 'NAME, NAME=STORE or NAME=PATH, each name once')
    if name == ALL_SETS or name.startswith('tag/'):
      raise UserError('--sets', text, f"another name: '{ALL_SETS}' and 'tag/TAG' are those of several sets together")
    if not given and name not in held_out.valid:
      raise UserError('--sets', name, f"{', '.join(held_out.valid) or 'no names (the run has no sets of its own)'}; or NAME=STORE, "
                      'NAME=PATH', held_out.valid)
    chosen[name] = _open(name, path, held_out, source, cache_dir) if given else held_out.valid[name]
  return chosen, {tag: names for tag, names in held_out.tags.items() if all(chosen.get(name) is held_out.valid[name] for name in names)}


def _open(name: str, path: str, held_out: HeldOut, source: SourceConfig, cache_dir: Path) -> TokenStore:
  if '://' not in path and not (expanded(path) / MANIFEST).exists():
    if not source.has_examples and any(store.weighted for store in held_out.valid.values()):
      raise UserError('--sets', f'{name}={path}', 'NAME=STORE, from tools.prepare_data: this run was trained on stores, and its config '
                      'does not say which fields of a file have its examples')
    config = dataclasses.replace(source, path=path, split=SourceConfig.split) if source.has_examples else SourceConfig(path)
    recipe = Recipe(open_source(config, cache_dir), held_out.tokenizer)
    folder = cache_dir / 'data' / f'set-{recipe.fingerprint()[:16]}'
    make = lambda: write_store(folder, recipe, processes=cores(), title=f'tokenizing {name}')
    # Process 0 first: the others then find the store in a shared cache, or write it to their own disk.
    made = make() if is_primary() else None
    broadcast(f'set {name}')
    return made or make()
  store = TokenStore.open(path if '://' in path else expanded(path))
  if store.tokenizer_sha256 != held_out.tokenizer.sha256:
    raise UserError('--sets', f'{name}={path}', f"a store made with the run's tokenizer {held_out.tokenizer.sha256[:12]}, not "
                    f'{store.tokenizer_sha256[:12]}: tools.prepare_data --tokenizer=WORKDIR/data/tokenizer, or the documents themselves')
  if store.labels != held_out.labels:
    raise UserError('--sets', f'{name}={path}', f"a store with the run's classes, {', '.join(held_out.labels) or 'none'}, not "
                    f'{", ".join(store.labels) or "none"}')
  store.check()
  return store
