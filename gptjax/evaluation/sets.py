"""Sets of documents to score: a run's own held-out ones by name, token stores, and files."""

from collections.abc import Sequence
from pathlib import Path

from gptjax.config import SourceConfig, UserError
from gptjax.data import HeldOut, Recipe, TokenStore, cores, open_source, write_store
from gptjax.data.store import MANIFEST
from gptjax.files import expanded
from gptjax.distributed import is_primary, broadcast


def choose_sets(wanted: Sequence[str] | None, held_out: HeldOut, cache_dir: Path) -> tuple[dict[str, TokenStore], dict[str, list[str]]]:
  """The stores that --sets names, and the tags whose sets are all among them.

  Args:
    wanted: NAME of one of the run's own sets; NAME=STORE, a folder or URL that tools.prepare_data made with the run's tokenizer; or
      NAME=PATH of any documents that a source can be, which are tokenized into the cache. None: all of the run's own.
    held_out: of the run.
    cache_dir: tokenized documents lie in `cache_dir/data`.

  Raises:
    UserError: a name that is not there or there twice, a store of another tokenizer, or documents that cannot be read.
  """
  if wanted is None:
    return held_out.valid, held_out.tags
  chosen: dict[str, TokenStore] = {}
  for text in wanted:
    name, given, place = text.partition('=')
    if not name or name in chosen or (given and not place):
      raise UserError('--sets', text, 'NAME, NAME=STORE or NAME=PATH, each name once')
    if not given and name not in held_out.valid:
      raise UserError('--sets', name, f"{', '.join(held_out.valid) or 'no names, since the run has no sets of its own'}; or NAME=STORE, "
                      'NAME=PATH', held_out.valid)
    chosen[name] = _open(name, place, held_out, cache_dir) if given else held_out.valid[name]
  return chosen, {tag: names for tag, names in held_out.tags.items() if all(chosen.get(name) is held_out.valid[name] for name in names)}


def _open(name: str, place: str, held_out: HeldOut, cache_dir: Path) -> TokenStore:
  if '://' not in place and not (expanded(place) / MANIFEST).exists():
    return _tokenized(name, place, held_out, cache_dir)
  store = TokenStore.open(place if '://' in place else expanded(place))
  if store.tokenizer_sha256 != held_out.tokenizer.sha256:
    raise UserError('--sets', f'{name}={place}', f"a store made with the run's tokenizer {held_out.tokenizer.sha256[:12]}, not "
                    f'{store.tokenizer_sha256[:12]}: tools.prepare_data --tokenizer=WORKDIR/data/tokenizer, or the documents themselves')
  store.check()
  return store


def _tokenized(name: str, place: str, held_out: HeldOut, cache_dir: Path) -> TokenStore:
  recipe = Recipe(open_source(SourceConfig(place), cache_dir), held_out.tokenizer)
  make = lambda: write_store(cache_dir / 'data' / f'set-{recipe.fingerprint()[:16]}', recipe, processes=cores(), title=f'tokenizing {name}')
  # Process 0 first, so that the others find it in a cache they share, or make it on a disk of their own.
  store = make() if is_primary() else None
  broadcast(f'set {name}')
  return store or make()
