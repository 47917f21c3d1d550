"""The device's side of a server: a cache with a slot per text, programs that read prompts into it, and one that draws a token per slot."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gptjax.inference.forward import forward, put_batch
from gptjax.inference.sampling import penalized, sample
from gptjax.model import AbstractModel, Caches, Head, Parameters, Positions, abstract_model, empty_cache
from gptjax.sharding import BATCH_SPEC, batch_shard_map, batch_shards

ALTERNATIVES = 20
"""Most likely tokens that are known of each place: as many as OpenAI's interface allows."""
BIASES = 300
"""Tokens that a text may be given a bias for."""
SIZES = 192, 768, 3072, 12288, 49152
"""Places per slot that the cache may have: those up to half of the context, and the context."""
CHUNKS = 32, 64, 128, 256
"""Tokens of a prompt that a program reads; a shorter piece is padded, to less than twice its length from 33 tokens on. The beginnings of
several prompts are read together, up to the largest of these numbers in all: on a CPU 256 tokens take four times as long as 32."""


class Settings(NamedTuple):
  """How a slot's tokens are drawn, as numbers; see gptjax.inference.Sampling."""

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  frequency_penalty: float = 0.0
  """subtracted from a token's logit per occurrence in the continuation"""
  presence_penalty: float = 0.0
  """subtracted from the logit of every token that is in the continuation"""

  @property
  def penalizes(self) -> bool:
    """Whether any of its penalties changes logits."""
    return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)


class _Tables(NamedTuple):
  """What changes the logits of each slot."""

  prompted: Bool[Array, 'B V']
  """ids in the prompt"""
  counts: Int[Array, 'B V']
  """of each id in the continuation"""
  bias: Float[Array, 'B V']


class Drawn(NamedTuple):
  """Tokens that were drawn or read, with log-probabilities under the model, in nats, before any setting."""

  ids: Int[np.ndarray, 'T']
  logprobs: Float[np.ndarray, 'T']
  best: Int[np.ndarray, 'T A']
  """the most likely ids; of a text that asks for these"""
  best_logprobs: Float[np.ndarray, 'T A']


@dataclasses.dataclass
class Slot:
  """The place of one text in the cache, as the host knows it."""

  tokens: list[int] = dataclasses.field(default_factory=list)
  """whose keys and values are in the cache; they stay after the text has ended, for another that begins like it"""
  unread: list[int] = dataclasses.field(default_factory=list)
  """the rest of the prompt"""
  next: int = 0
  """the text's last token, which the model has not read"""
  drawn: int = 0
  """tokens of the continuation so far"""
  seed: int = 0
  settings: Settings = Settings()
  changes: bool = False
  """whether penalties or biases change its logits"""
  top_logprobs: bool = False
  """whether the most likely tokens are asked for"""


class Engine:
  """Slots for texts that grow together. Every shape is compiled by `compile`; the tokens of a text depend on its prompt, its settings and
  its seed, and not on the texts in other slots.

  Args:
    model, mesh: of the parameters; the groups of devices that share out a batch have equal numbers of slots.
    parameters: from `Decoder.prepare` of the same model, mesh and stage.
    forbidden: ids that are never drawn.
    slots: texts at a time; rounded up to a multiple of these groups.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, parameters: Parameters, forbidden: tuple[int, ...], slots: int, zero_stage: int = 0):
    self._model = abstract_model(dataclasses.replace(model.config, dropout=0.0), model.compute.plain, model.context).transposed()
    self.mesh, self.context, self._parameters = mesh, model.context, parameters
    self.groups = batch_shards(mesh)
    count = -(-slots // self.groups) * self.groups
    self._programs = _programs(self._model, mesh, forbidden, zero_stage, count)
    self.slots = [Slot() for _ in range(count)]
    self.sizes = [size for size in SIZES if 2 * size <= self.context] + [self.context]
    self.chunks = [size for size in CHUNKS if size < self.context] or [self.context]
    self.size = self.sizes[0]
    """places per slot in the cache"""
    self._cache, self._tables = self._programs.empty(size=self.size)

  def compile(self, say: Callable[[str], None] = lambda text: None) -> None:
    """Compiles and runs every program once."""
    for number, size in enumerate(self.sizes, 1):
      say(f'compiling for texts of up to {size:,} tokens ({number} of {len(self.sizes)})')
      self._grow(size)
      for chunk in self.chunks:
        for count in sorted({1, self._together(chunk)}):
          self._read([], chunk, count, begin=True, scored=False)
        self._read([], chunk, 1, begin=False, scored=False)
      self._read([], self.chunks[-1], 1, begin=False, scored=True)
      self._decode([])
      self._tables = self._programs.admit(self._tables, **self._admission(len(self.slots), [], {}))
    self.size = self.sizes[0]
    self._cache, self._tables = self._programs.empty(size=self.size)

  def admit(self, slot: int, prompt: Sequence[int], kept: int, settings: Settings, seed: int, bias: dict[int, float],
            top_logprobs: bool = False) -> None:
    """Gives a slot a new text, of whose prompt the first `kept` tokens are in its cache already, but not all; `top_logprobs`: the
    most likely tokens of each place are asked for."""
    self._tables = self._programs.admit(self._tables, **self._admission(slot, prompt, bias))
    self.slots[slot] = Slot(list(prompt[:kept]), list(prompt[kept:]), seed=seed, settings=settings,
                             changes=bool(bias) or settings.penalizes, top_logprobs=top_logprobs)

  def read(self, slots: Sequence[int], scored: bool, meanwhile: Callable[[], None] = lambda: None) -> dict[int, Drawn | None]:
    """Reads the next pieces of the prompts of some of these slots: of the first one, and of as many others as the same program takes.
    Returns for each slot that was read the tokens that follow those that were read: for a prompt that is read to its end the first token
    of its continuation, if they are `scored` after the tokens of the prompt before it; None if there are none. `meanwhile` is called
    while the device is at work."""
    begins = lambda slot: not (scored or self.slots[slot].tokens)
    pieces = {slot: self.slots[slot].unread[:self.chunks[-1]] for slot in slots}
    begin = begins(slots[0])
    chunk = self.chunks[-1] if scored else next(size for size in self.chunks if len(pieces[slots[0]]) <= size)
    queues: list[list[int]] = [[] for _ in range(self.groups)]
    for slot in slots:
      if begins(slot) == begin and len(pieces[slot]) <= chunk:
        queues[self.group(slot)].append(slot)
    together = self._together(chunk) if begin else 1
    count = together if 2 * max(map(len, queues)) > together else 1
    queues, read = [queue[:count] for queue in queues], dict[int, Drawn | None]()
    self._fit(max(len(self.slots[slot].tokens) + len(pieces[slot]) for queue in queues for slot in queue))
    found = self._read(queues, chunk, count, begin, scored)
    meanwhile()
    found = Drawn(*map(np.asarray, found))
    for group, queue in enumerate(queues):
      for row, slot in enumerate(queue, group * count):
        text, piece = self.slots[slot], pieces[slot]
        text.tokens, text.unread = text.tokens + piece, text.unread[len(piece):]
        known = Drawn(*(part[row, :len(piece)] for part in found))
        read[slot] = known if scored or not text.unread else None
        if not text.unread:
          text.next, text.drawn = int(known.ids[-1]), 1
    return read

  def decode(self, slots: Sequence[int], meanwhile: Callable[[], None] = lambda: None) -> dict[int, Drawn]:
    """The next token of each of these slots, whose prompts have been read; calls `meanwhile` while the device is at work."""
    self._fit(max(len(self.slots[slot].tokens) + 1 for slot in slots))
    found = self._decode(slots)
    meanwhile()
    found = Drawn(*map(np.asarray, found))
    for text in map(self.slots.__getitem__, slots):
      text.tokens.append(text.next)
    for slot in slots:
      self.slots[slot].next, self.slots[slot].drawn = int(found.ids[slot]), self.slots[slot].drawn + 1
    return {slot: Drawn(*(part[slot:slot + 1] for part in found)) for slot in slots}

  def group(self, slot: int) -> int:
    """The group of devices that has a slot."""
    return slot * self.groups // len(self.slots)

  def _fit(self, tokens: int) -> None:
    """Makes place for this many tokens per slot, size by size: each of these steps has been compiled."""
    for size in self.sizes:
      if self.size < size and self.size < tokens:
        self._grow(size)

  def _grow(self, size: int) -> None:
    if size > self.size:
      self._cache, self.size = self._programs.grow(self._cache, size=size), size

  def _together(self, chunk: int) -> int:
    """Prompts per group of devices whose beginnings are read together, if these have up to `chunk` tokens."""
    return min(self.chunks[-1] // chunk, len(self.slots) // self.groups)

  def _read(self, queues: list[list[int]], chunk: int, count: int, begin: bool, scored: bool) -> Any:
    """Reads a piece of the prompts of these slots, at most `count` in each group."""
    slots = sum(([*queue, *[None] * (count - len(queue))] for queue in queues or [[] for _ in range(self.groups)]), [])
    rows = self._rows(slots)
    rows |= {'slot': np.array([(slot or 0) % (len(self.slots) // self.groups) for slot in slots], np.int32),
             'tokens': np.zeros((len(slots), chunk), np.int32), 'following': np.zeros((len(slots), chunk), np.int32),
             'last': np.zeros(len(slots), np.int32), 'ends': np.zeros(len(slots), bool)}
    for row, slot in enumerate(slots):
      if slot is not None:
        unread = self.slots[slot].unread
        tokens = unread[:chunk]
        rows['tokens'][row, :len(tokens)] = tokens
        rows['following'][row, :len(tokens)] = [*unread[1:], 0][:len(tokens)]
        rows['last'][row], rows['ends'][row] = len(tokens) - 1, len(tokens) == len(unread)
    put = put_batch(self.mesh, rows)
    if begin:
      (new, self._tables), found = self._programs.begin(self._parameters, self._tables, put)
      self._cache = self._programs.put(self._cache, new, put['slot'], put['start'])
    else:
      (self._cache, self._tables), found = self._programs.extend(self._parameters, self._cache, self._tables, put, scored=scored)
    return found

  def _decode(self, slots: Sequence[int]) -> Any:
    rows = self._rows([slot if slot in slots else None for slot in range(len(self.slots))])
    rows['token'] = np.array([slot.next for slot in self.slots], np.int32)
    (self._cache, self._tables), found = self._programs.decode(self._parameters, self._cache, self._tables, put_batch(self.mesh, rows))
    return found

  def _rows(self, slots: Sequence[int | None]) -> dict[str, np.ndarray]:
    """What a program needs to know of slots; None: a row without a text, for which nothing is written."""
    texts = [None if slot is None else self.slots[slot] for slot in slots]
    column = lambda dtype, value, none=0: np.array([value(text) if text else none for text in texts], dtype)
    return {'start': column(np.int32, lambda text: len(text.tokens), self.size), 'drawn': column(np.int32, lambda text: text.drawn),
            'seed': column(np.uint32, lambda text: text.seed), 'changes': column(bool, lambda text: text.changes),
            'top_logprobs': column(bool, lambda text: text.top_logprobs),
            **{name: column(np.float32, lambda text: getattr(text.settings, name), one) for name, one in Settings()._asdict().items()}}

  def _admission(self, slot: int, prompt: Sequence[int], bias: dict[int, float]) -> dict[str, Any]:
    none = self._model.config.table_rows  # beyond the table: dropped
    ids, biased, values = np.full(self.context, none, np.int32), np.full(BIASES, none, np.int32), np.zeros(BIASES, np.float32)
    ids[:len(prompt)] = prompt
    biased[:len(bias)], values[:len(bias)] = [*bias], [*bias.values()]
    return {'slot': np.int32(slot), 'ids': ids, 'biased': biased, 'values': values}


class _Programs(NamedTuple):
  empty: Callable[..., tuple[Caches, _Tables]]
  grow: Callable[..., Caches]
  admit: Callable[..., _Tables]
  begin: Callable[..., tuple[tuple[Caches, _Tables], Any]]
  put: Callable[..., Caches]
  extend: Callable[..., tuple[tuple[Caches, _Tables], Any]]
  decode: Callable[..., tuple[tuple[Caches, _Tables], Any]]


@functools.lru_cache(maxsize=4)
def _programs(model: AbstractModel, mesh: Mesh, forbidden: tuple[int, ...], zero_stage: int, count: int) -> _Programs:
  banned = np.zeros(model.config.table_rows, bool)
  banned[list(forbidden)] = True
  local = count // batch_shards(mesh)

  def run(function, parameters, *inputs):
    specs = (BATCH_SPEC,) * len(inputs)
    state, found = forward(model, mesh, zero_stage, function, specs, (BATCH_SPEC, BATCH_SPEC))(parameters, *inputs)
    return state, jax.tree.map(lambda x: jax.reshard(x, PartitionSpec(*(None,) * x.ndim)), found)

  @functools.partial(jax.jit, donate_argnames='tables')
  def begin(parameters, tables, rows):
    def step(module, tables, rows):
      count, length = rows['tokens'].shape
      cache = empty_cache(model.config, model.compute, count, length, complete=True)
      hidden, cache, _ = module.hidden(rows['tokens'], Positions(jnp.broadcast_to(jnp.arange(length), (count, length))), cache)
      tables, known = _follow(module.head, hidden, tables, rows, banned, scored=False)
      return (cache, tables), known
    return run(step, parameters, tables, rows)

  @functools.partial(jax.jit, donate_argnames='cache')
  def put(cache, new, slots, start):
    return batch_shard_map(_put, (BATCH_SPEC,) * 4, BATCH_SPEC)(cache, new, slots, start)

  @functools.partial(jax.jit, static_argnames='scored', donate_argnames=('cache', 'tables'))
  def extend(parameters, cache, tables, rows, scored):
    def step(module, cache, tables, rows):
      slot, start = rows['slot'][0], rows['start']
      positions = Positions(start[:, None] + jnp.arange(rows['tokens'].shape[1]), cached=start)
      row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 0), cache)
      hidden, row, _ = module.hidden(rows['tokens'], positions, row)
      tables, known = _follow(module.head, hidden, tables, rows, banned, scored)
      return (jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, 0), cache, row), tables), known
    return run(step, parameters, cache, tables, rows)

  @functools.partial(jax.jit, donate_argnames=('cache', 'tables'))
  def decode(parameters, cache, tables, rows):
    def step(module, cache, tables, rows):
      is_active = rows['start'] < cache[0].keys.shape[2]  # the prompts of others are still being read
      hidden, cache, _ = module.hidden(rows['token'][:, None], Positions(rows['start'][:, None], cached=rows['start']), cache)
      logits = _logits(module.head, hidden)
      ids = _draw(logits, tables, rows, banned)
      tables = tables._replace(counts=tables.counts.at[jnp.arange(local), ids].add(is_active.astype(jnp.int32)))
      return (cache, tables), _known(logits, ids, rows['top_logprobs'].any())
    return run(step, parameters, cache, tables, rows)

  @functools.partial(jax.jit, static_argnames='size')
  def empty(size):
    def make(_):
      flat = jnp.zeros((local, model.config.table_rows))
      return empty_cache(model.config, model.compute, local, size, complete=True), _Tables(flat > 0, flat.astype(jnp.int32), flat)
    return batch_shard_map(make, (BATCH_SPEC,), (BATCH_SPEC, BATCH_SPEC))(jnp.zeros(count, out_sharding=BATCH_SPEC))

  return _Programs(empty, _grow, _admit, begin, put, extend, decode)


@functools.partial(jax.jit, static_argnames='size')
def _grow(cache: Caches, size: int) -> Caches:
  """With `size` places per slot, which is more than it has."""
  return jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)]), cache)


@functools.partial(jax.jit, donate_argnames='tables')
def _admit(tables: _Tables, slot: Int[Array, ''], ids: Int[Array, 'T'], biased: Int[Array, 'N'], values: Float[Array, 'N']) -> _Tables:
  """With a new text in a slot, of a prompt with these `ids` and biases; ids beyond the table count for nothing."""
  count, vocab = tables.bias.shape
  mine = jax.reshard((jnp.arange(count) == slot)[:, None], BATCH_SPEC)
  prompted = jnp.zeros(vocab, bool).at[ids].set(True, mode='drop')
  bias = jnp.zeros(vocab).at[biased].set(values, mode='drop')
  return _Tables(jnp.where(mine, prompted, tables.prompted), jnp.where(mine, 0, tables.counts), jnp.where(mine, bias, tables.bias))


def _put(cache: Caches, new: Caches, slots: Int[Array, 'R'], start: Int[Array, 'R']) -> Caches:
  """A cache whose slots begin with new rows; rows that start beyond the cache have no text, and change nothing."""
  take = lambda x, index: jax.lax.dynamic_slice_in_dim(x, index, 1, 0)

  def put_row(row, cache):
    def put_in(old, new):
      places = min(old.shape[2], new.shape[2])
      written = jnp.where(start[row] < old.shape[2], take(new, row)[:, :, :places], take(old, slots[row])[:, :, :places])
      return jax.lax.dynamic_update_slice(old, written, (slots[row], 0, 0, 0))
    return jax.tree.map(put_in, cache, new)
  return jax.lax.fori_loop(0, len(slots), put_row, cache)


def _logits(head: Head, hidden: Float[Array, 'N D']) -> Float[Array, 'N V']:
  return jax.reshard(head.logits(hidden), PartitionSpec(None, None))


def _draw(logits: Float[Array, 'B V'], tables: _Tables, rows: dict[str, Array], banned: Bool[np.ndarray, 'V']) -> Int[Array, 'B']:
  """A token of each row, by its settings and keyed by its seed and the number of tokens drawn."""
  logits = jnp.where(banned, -jnp.inf, logits)
  # Most texts have no penalties and biases, whose tables take time to read.
  logits = jax.lax.cond(rows['changes'].any(), _changed, lambda logits, *_: logits, logits, tables, rows)
  keys = jax.vmap(lambda seed, drawn: jax.random.fold_in(jax.random.key(seed), drawn))(rows['seed'], rows['drawn'])
  return sample(logits, {name: rows[name] for name in Settings._fields}, keys).astype(jnp.int32)


def _follow(head: Head, hidden: Float[Array, 'N D'], tables: _Tables, rows: dict[str, Array], banned: Bool[np.ndarray, 'V'],
            scored: bool) -> tuple[_Tables, Drawn]:
  """What is known of the tokens after those that were read, and tables with the first token of each prompt that was read to its end."""
  slots, ends, (count, length) = rows['slot'], rows['ends'], rows['tokens'].shape
  following, last = rows['following'].reshape(-1), rows['last'] + length * jnp.arange(count)
  if not scored:
    hidden, following, last = hidden[last], following[last], jnp.arange(count)
  logits = _logits(head, hidden)
  ids = _draw(logits[last], jax.tree.map(lambda x: x[slots], tables), rows, banned)
  following = following.at[last].set(jnp.where(ends, ids, following[last]))
  known = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), _known(logits, following, rows['top_logprobs'].any()))
  return tables._replace(counts=tables.counts.at[slots, ids].add(ends.astype(jnp.int32))), known


def _changed(logits: Float[Array, 'B V'], tables: _Tables, rows: dict[str, Array]) -> Float[Array, 'B V']:
  """Logits after the penalties and biases of each row."""
  logits = penalized(logits, tables.prompted | (tables.counts > 0), rows['repetition_penalty'])
  column = lambda name: rows[name][:, None]
  return logits + tables.bias - column('frequency_penalty') * tables.counts - column('presence_penalty') * (tables.counts > 0)


def _known(logits: Float[Array, 'T V'], ids: Int[Array, 'T'], top_logprobs: Bool[Array, '']) -> Drawn:
  """What the model knows of these tokens, and of the most likely ones if they are asked for: their search takes a pass of its own."""
  most, top = min(ALTERNATIVES, logits.shape[-1]), logits.max(-1, keepdims=True)
  total = jnp.log(jnp.exp(logits - top).sum(-1, keepdims=True))
  none = lambda logits: (jnp.zeros((len(ids), most)), jnp.zeros((len(ids), most), jnp.int32))
  best_logits, best = jax.lax.cond(top_logprobs, lambda logits: tuple(jax.lax.top_k(logits, most)), none, logits)
  logprobs = lambda logits: logits - top - total
  return Drawn(ids, logprobs(jnp.take_along_axis(logits, ids[:, None], -1))[:, 0], best, logprobs(best_logits))  # type: ignore[arg-type]
