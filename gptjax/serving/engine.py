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
from gptjax.model import AbstractModel, Caches, Parameters, Positions, abstract_model, empty_cache
from gptjax.sharding import BATCH_SPEC, batch_shard_map, batch_shards

ALTERNATIVES = 20
"""Most likely tokens that are known of each place: as many as OpenAI's interface allows."""
BIASES = 300
"""Tokens that a text may be given a bias for."""
SIZES = 256, 1024, 4096, 16384, 65536
"""Places per slot that the cache may have, besides the complete context."""


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
  def filters(self) -> bool:
    """Whether it takes more than a temperature."""
    return self[1:] != Settings()[1:]


class _Texts(NamedTuple):
  """What is on the device: per slot."""

  cache: Caches
  prompted: Bool[Array, 'B V']
  """ids in the prompt"""
  counts: Int[Array, 'B V']
  """of each id in the continuation"""
  bias: Float[Array, 'B V']


class Drawn(NamedTuple):
  """Tokens that were drawn or read, with log-probabilities under the model, in nats, before any setting."""

  ids: Int[np.ndarray, '...']
  logprobs: Float[np.ndarray, '...']
  best: Int[np.ndarray, '... A']
  """the most likely ids"""
  best_logprobs: Float[np.ndarray, '... A']


@dataclasses.dataclass
class Slot:
  """The place of one text in the cache, as the host knows it."""

  tokens: list[int] = dataclasses.field(default_factory=list)
  """whose keys and values are in the cache; they stay after the text has ended, for another that begins like it"""
  next: int = 0
  """the text's last token, which the model has not read"""
  drawn: int = 0
  """tokens of the continuation so far"""
  seed: int = 0
  settings: Settings = Settings()
  special: bool = False
  """whether its tokens have a bias"""


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
    self.sizes = [size for size in SIZES if size < self.context] + [self.context]
    self.chunks = [size for size in (32, 256) if size < self.context] or [self.context]
    self.size = self.sizes[0]
    """places per slot in the cache"""
    self._texts = self._programs.fresh(size=self.size)

  def compile(self, say: Callable[[str], None] = lambda text: None) -> None:
    """Compiles and runs every program once."""
    for number, size in enumerate(self.sizes, 1):
      say(f'compiling for texts of up to {size:,} tokens ({number} of {len(self.sizes)})')
      self._grow(size)
      for chunk in self.chunks:
        self._extend({}, chunk, False, {})
      self._extend({}, self.chunks[-1], True, {})
      for filters in (False, True):
        self._decode([], filters)
      self._texts = self._programs.admit(self._texts, **self._admission(len(self.slots), [], {}))
    self.size, self._texts = self.sizes[0], self._programs.fresh(size=self.sizes[0])

  def admit(self, slot: int, prompt: Sequence[int], kept: int, settings: Settings, seed: int, bias: dict[int, float]) -> None:
    """Gives a slot a new text, whose first `kept` tokens are in its cache already."""
    self._texts = self._programs.admit(self._texts, **self._admission(slot, prompt, bias))
    self.slots[slot] = Slot(list(prompt[:kept]), prompt[-1], 0, seed, settings, bool(bias))

  def extend(self, reads: dict[int, Sequence[int]], following: dict[int, int] | None = None) -> dict[int, Drawn]:
    """Reads tokens of prompts into slots, at most chunks[-1] each and one slot per group. With the token after the last one of each,
    returns what the model knows of the token after each."""
    score = following is not None
    assert all(reads.values()) and len({self.group(slot) for slot in reads}) == len(reads)
    longest = max(map(len, reads.values()))
    self._fit(max(len(self.slots[slot].tokens) + len(tokens) for slot, tokens in reads.items()))
    chunk = self.chunks[-1] if score else next(size for size in self.chunks if longest <= size)
    found = self._extend(reads, chunk, score, following or {})
    for slot, tokens in reads.items():
      self.slots[slot].tokens += tokens
    if found is None:
      return {}
    return {slot: Drawn(*(part[self.group(slot), :len(tokens)] for part in found)) for slot, tokens in reads.items()}

  def decode(self, active: Sequence[int]) -> dict[int, Drawn]:
    """The next token of each of these slots."""
    slots = self.slots
    self._fit(max(len(slots[slot].tokens) + 1 for slot in active))
    found = self._decode(active, any(slots[slot].settings.filters or slots[slot].special for slot in active))
    for slot in active:
      slots[slot].tokens.append(slots[slot].next)
      slots[slot].next = int(found.ids[slot])
      slots[slot].drawn += 1
    return {slot: Drawn(*(part[slot] for part in found)) for slot in active}

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
      self._texts, self.size = self._programs.grow(self._texts, size=size), size

  def _extend(self, reads: dict[int, Sequence[int]], chunk: int, score: bool, following: dict[int, int]) -> Drawn | None:
    per_group = len(self.slots) // self.groups
    rows = {'slot': np.zeros(self.groups, np.int32), 'start': np.full(self.groups, self.size, np.int32),  # no place: nothing is written
            'tokens': np.zeros((self.groups, chunk), np.int32), 'following': np.zeros((self.groups, chunk), np.int32)}
    for slot, tokens in reads.items():
      group = self.group(slot)
      rows['slot'][group], rows['start'][group] = slot % per_group, len(self.slots[slot].tokens)
      rows['tokens'][group, :len(tokens)] = tokens
      rows['following'][group, :len(tokens)] = [*tokens[1:], following.get(slot, 0)]
    self._texts, found = self._programs.extend(self._parameters, self._texts, put_batch(self.mesh, rows), score=score)
    return Drawn(*map(np.asarray, found)) if score else None

  def _decode(self, active: Sequence[int], filters: bool) -> Drawn:
    count = len(self.slots)
    rows = {'token': np.zeros(count, np.int32), 'position': np.full(count, self.size, np.int32), 'drawn': np.zeros(count, np.int32),
            'seed': np.zeros(count, np.uint32), **{name: np.full(count, value, np.float32) for name, value in Settings()._asdict().items()}}
    for slot in active:
      text = self.slots[slot]
      rows['token'][slot], rows['position'][slot], rows['drawn'][slot] = text.next, len(text.tokens), text.drawn
      rows['seed'][slot] = text.seed
      for name, value in text.settings._asdict().items():
        rows[name][slot] = value
    self._texts, found = self._programs.decode(self._parameters, self._texts, put_batch(self.mesh, rows), filters=filters)
    return Drawn(*map(np.asarray, found))

  def _admission(self, slot: int, prompt: Sequence[int], bias: dict[int, float]) -> dict[str, Any]:
    none = self._model.config.table_rows  # beyond the table: dropped
    ids, biased, values = np.full(self.context, none, np.int32), np.full(BIASES, none, np.int32), np.zeros(BIASES, np.float32)
    ids[:len(prompt)] = prompt
    biased[:len(bias)], values[:len(bias)] = [*bias], [*bias.values()]
    return {'slot': np.int32(slot), 'ids': ids, 'biased': biased, 'values': values}


class _Programs(NamedTuple):
  fresh: Callable[..., _Texts]
  grow: Callable[..., _Texts]
  admit: Callable[..., _Texts]
  extend: Callable[..., tuple[_Texts, Any]]
  decode: Callable[..., tuple[_Texts, Any]]


@functools.lru_cache(maxsize=4)
def _programs(model: AbstractModel, mesh: Mesh, forbidden: tuple[int, ...], zero_stage: int, count: int) -> _Programs:
  banned = np.zeros(model.config.table_rows, bool)
  banned[list(forbidden)] = True
  specs: Any = _Texts(BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, BATCH_SPEC)  # type: ignore[arg-type]
  local = count // batch_shards(mesh)

  def run(function, in_specs, parameters, *inputs):
    texts, found = forward(model, mesh, zero_stage, function, in_specs, (specs, BATCH_SPEC))(parameters, *inputs)
    return texts, jax.tree.map(lambda x: jax.reshard(x, PartitionSpec(*(None,) * x.ndim)), found)

  def known(logits, ids):
    logprobs = jax.nn.log_softmax(logits)
    best_logprobs, best = jax.lax.top_k(logprobs, min(ALTERNATIVES, logits.shape[-1]))
    return ids, jnp.take_along_axis(logprobs, ids[..., None], -1)[..., 0], best, best_logprobs

  def read(head, hidden, rows):
    logits = jax.reshard(head.logits(hidden), PartitionSpec(None, None)).reshape(*rows['tokens'].shape, -1)
    return known(logits, rows['following'])

  @functools.partial(jax.jit, static_argnames='score', donate_argnames='texts')
  def extend(parameters, texts, rows, score):
    def step(module, texts, rows):
      slot, start = rows['slot'][0], rows['start']
      row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 0), texts.cache)
      positions = Positions(start[:, None] + jnp.arange(rows['tokens'].shape[1]), cached=start)
      hidden, row, _ = module.hidden(rows['tokens'], positions, row)
      put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, 0)
      found = read(module.head, hidden, rows) if score else start
      return texts._replace(cache=jax.tree.map(put, texts.cache, row)), found
    return run(step, (specs, BATCH_SPEC), parameters, texts, rows)

  @functools.partial(jax.jit, static_argnames='filters', donate_argnames='texts')
  def decode(parameters, texts, rows, filters):
    def step(module, texts, rows):
      hidden, cache, _ = module.hidden(rows['token'][:, None], Positions(rows['position'][:, None], cached=rows['position']), texts.cache)
      logits = jax.reshard(module.head.logits(hidden), PartitionSpec(None, None))
      changed = jnp.where(banned, -jnp.inf, logits)
      if filters:
        changed = _penalized(changed, texts, rows)
      keys = jax.vmap(lambda seed, drawn: jax.random.fold_in(jax.random.key(seed), drawn))(rows['seed'], rows['drawn'])
      ids = _sample(changed, rows, keys, filters).astype(jnp.int32)
      is_active = rows['position'] < texts.cache[0].keys.shape[2]  # the prompts of others are still being read
      counts = texts.counts.at[jnp.arange(local), ids].add(is_active.astype(jnp.int32))
      return texts._replace(cache=cache, counts=counts), known(logits, ids)
    return run(step, (specs, BATCH_SPEC), parameters, texts, rows)

  @functools.partial(jax.jit, static_argnames='size')
  def fresh(size):
    def make(_):
      flat = jnp.zeros((local, model.config.table_rows))
      return _Texts(empty_cache(model.config, model.compute, local, size, complete=True), flat > 0, flat.astype(jnp.int32), flat), _
    return batch_shard_map(make, (BATCH_SPEC,), (specs, BATCH_SPEC))(jnp.zeros(count, out_sharding=BATCH_SPEC))[0]

  return _Programs(fresh, _grow, _admit, extend, decode)


@functools.partial(jax.jit, static_argnames='size')
def _grow(texts: _Texts, size: int) -> _Texts:
  """With a cache of `size` places per slot, which is more than it has."""
  pad = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, size - x.shape[2]), (0, 0)])
  return texts._replace(cache=jax.tree.map(pad, texts.cache))


@functools.partial(jax.jit, donate_argnames='texts')
def _admit(texts: _Texts, slot: Int[Array, ''], ids: Int[Array, 'T'], biased: Int[Array, 'N'], values: Float[Array, 'N']) -> _Texts:
  """With a new text in a slot, of a prompt with these `ids` and biases; ids beyond the table count for nothing."""
  count, vocab = texts.bias.shape
  mine = jax.reshard((jnp.arange(count) == slot)[:, None], BATCH_SPEC)
  prompted = jnp.zeros(vocab, bool).at[ids].set(True, mode='drop')
  bias = jnp.zeros(vocab).at[biased].set(values, mode='drop')
  return texts._replace(prompted=jnp.where(mine, prompted, texts.prompted), counts=jnp.where(mine, 0, texts.counts),
                        bias=jnp.where(mine, bias, texts.bias))


def _penalized(logits: Float[Array, 'B V'], texts: _Texts, rows: dict[str, Array]) -> Float[Array, 'B V']:
  """Logits after the penalties and biases of each row."""
  column = lambda name: rows[name][:, None]
  penalty = column('repetition_penalty')
  seen = texts.prompted | (texts.counts > 0)
  logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
  return (logits + texts.bias - column('frequency_penalty') * texts.counts - column('presence_penalty') * (texts.counts > 0))


def _sample(logits: Float[Array, 'B V'], rows: dict[str, Array], keys: Array, filters: bool) -> Int[Array, 'B']:
  """An id per row, as `gptjax.inference.sample` draws it, with settings of each row."""
  column = lambda name: rows[name][:, None]
  scaled = (logits - logits.max(-1, keepdims=True)) / jnp.maximum(column('temperature'), 1e-30)
  if filters:
    ordered = jnp.sort(scaled, -1, descending=True)
    index = jnp.arange(ordered.shape[1])
    count = jnp.where(column('top_k') > 0, column('top_k'), ordered.shape[1])
    kth = jnp.take_along_axis(ordered, jnp.minimum(count, ordered.shape[1]).astype(jnp.int32) - 1, -1)
    likely = jnp.where(index < count, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(likely, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    nucleus = jnp.min(jnp.where(before < column('top_p'), likely, jnp.inf), -1, keepdims=True)
    lowest = jnp.maximum(jnp.where(column('top_p') < 1, nucleus, -jnp.inf), kth)
    scaled = jnp.where((scaled < lowest) | (scaled < jnp.log(column('min_p'))), -jnp.inf, scaled)
  return jnp.where(rows['temperature'] == 0, jnp.argmax(logits, -1), jax.vmap(jax.random.categorical)(keys, scaled))
