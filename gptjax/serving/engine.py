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
from gptjax.model import AbstractModel, Caches, Parameters, Positions, abstract_model, empty_cache
from gptjax.sharding import BATCH_SPEC, batch_shard_map, batch_shards

ALTERNATIVES = 20
"""Most likely tokens that are known of each place: as many as OpenAI's interface allows."""
BIASES = 300
"""Tokens that a text may be given a bias for."""
SIZES = 256, 1024, 4096, 16384, 65536
"""Places per slot that the cache may have, besides the complete context."""
CHUNKS = 32, 64, 128, 256
"""Tokens of a prompt that a program reads; a shorter piece is padded, to less than twice its length from 33 tokens on."""


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

  ids: Int[np.ndarray, 'T']
  logprobs: Float[np.ndarray, 'T']
  best: Int[np.ndarray, 'T A']
  """the most likely ids"""
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
    self.chunks = [size for size in CHUNKS if size < self.context] or [self.context]
    self.size = self.sizes[0]
    """places per slot in the cache"""
    self._texts = self._programs.fresh(size=self.size)

  def compile(self, say: Callable[[str], None] = lambda text: None) -> None:
    """Compiles and runs every program once."""
    for number, size in enumerate(self.sizes, 1):
      say(f'compiling for texts of up to {size:,} tokens ({number} of {len(self.sizes)})')
      self._grow(size)
      for chunk in self.chunks:
        self._extend({}, chunk, scored=False)
      self._extend({}, self.chunks[-1], scored=True)
      self._decode([])
      self._texts = self._programs.admit(self._texts, **self._admission(len(self.slots), [], {}))
    self.size, self._texts = self.sizes[0], self._programs.fresh(size=self.sizes[0])

  def admit(self, slot: int, prompt: Sequence[int], kept: int, settings: Settings, seed: int, bias: dict[int, float]) -> None:
    """Gives a slot a new text, of whose prompt the first `kept` tokens are in its cache already, but not all."""
    self._texts = self._programs.admit(self._texts, **self._admission(slot, prompt, bias))
    self.slots[slot] = Slot(list(prompt[:kept]), list(prompt[kept:]), seed=seed, settings=settings,
                             changes=bool(bias) or settings.penalizes)

  def read(self, slots: Sequence[int], scored: bool) -> dict[int, Drawn]:
    """Reads the next piece of the prompts of slots, one slot per group at most. Returns the tokens that follow those that were read: for
    a prompt that is read to its end the first token of its continuation, and if they are `scored` the tokens of the prompt before it."""
    assert len({self.group(slot) for slot in slots}) == len(slots)
    reads = {slot: self.slots[slot].unread[:self.chunks[-1]] for slot in slots}
    self._fit(max(len(self.slots[slot].tokens) + len(tokens) for slot, tokens in reads.items()))
    chunk = self.chunks[-1] if scored else next(size for size in self.chunks if max(map(len, reads.values())) <= size)
    found, drawn = self._extend(reads, chunk, scored), {}
    for slot, tokens in reads.items():
      text = self.slots[slot]
      text.tokens, text.unread = text.tokens + tokens, text.unread[len(tokens):]
      if scored or not text.unread:
        drawn[slot] = Drawn(*(np.asarray(part)[self.group(slot), :len(tokens)] for part in found))
      if not text.unread:
        text.next, text.drawn = int(drawn[slot].ids[-1]), 1
    return drawn

  def decode(self, slots: Sequence[int]) -> dict[int, Drawn]:
    """The next token of each of these slots, whose prompts have been read."""
    self._fit(max(len(self.slots[slot].tokens) + 1 for slot in slots))
    found = Drawn(*map(np.asarray, self._decode(slots)))
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
      self._texts, self.size = self._programs.grow(self._texts, size=size), size

  def _extend(self, reads: dict[int, list[int]], chunk: int, scored: bool) -> Drawn:
    groups, per_group = range(self.groups), len(self.slots) // self.groups
    at = {self.group(slot): slot for slot in reads}
    rows = self._rows([at.get(group) for group in groups])
    rows |= {'slot': np.array([at.get(group, 0) % per_group for group in groups], np.int32),
             'tokens': np.zeros((self.groups, chunk), np.int32), 'following': np.zeros((self.groups, chunk), np.int32),
             'last': np.zeros(self.groups, np.int32), 'ends': np.zeros(self.groups, bool)}
    for group, slot in at.items():
      tokens, unread = reads[slot], self.slots[slot].unread
      rows['tokens'][group, :len(tokens)] = tokens
      rows['following'][group, :len(tokens)] = [*unread[1:], 0][:len(tokens)]
      rows['last'][group], rows['ends'][group] = len(tokens) - 1, len(tokens) == len(unread)
    self._texts, found = self._programs.extend(self._parameters, self._texts, put_batch(self.mesh, rows), scored=scored)
    return found

  def _decode(self, slots: Sequence[int]) -> Drawn:
    rows = self._rows([slot if slot in slots else None for slot in range(len(self.slots))])
    rows['token'] = np.array([slot.next for slot in self.slots], np.int32)
    self._texts, found = self._programs.decode(self._parameters, self._texts, put_batch(self.mesh, rows))
    return found

  def _rows(self, slots: Sequence[int | None]) -> dict[str, np.ndarray]:
    """What a program needs to know of slots; None: a row without a text, for which nothing is written."""
    texts = [None if slot is None else self.slots[slot] for slot in slots]
    column = lambda dtype, value, none=0: np.array([value(text) if text else none for text in texts], dtype)
    return {'start': column(np.int32, lambda text: len(text.tokens), self.size), 'drawn': column(np.int32, lambda text: text.drawn),
            'seed': column(np.uint32, lambda text: text.seed), 'changes': column(bool, lambda text: text.changes),
            **{name: column(np.float32, lambda text: getattr(text.settings, name), one) for name, one in Settings()._asdict().items()}}

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

  def logits_of(head, hidden):
    return jax.reshard(head.logits(hidden), PartitionSpec(None, None))

  def draw(logits, prompted, counts, bias, rows):
    logits = jnp.where(banned, -jnp.inf, logits)
    # Most texts have no penalties and biases, whose tables take time to read.
    logits = jax.lax.cond(rows['changes'].any(), _changed, lambda logits, *_: logits, logits, prompted, counts, bias, rows)
    keys = jax.vmap(lambda seed, drawn: jax.random.fold_in(jax.random.key(seed), drawn))(rows['seed'], rows['drawn'])
    return sample(logits, {name: rows[name] for name in Settings._fields}, keys).astype(jnp.int32)

  @functools.partial(jax.jit, static_argnames='scored', donate_argnames='texts')
  def extend(parameters, texts, rows, scored):
    def step(module, texts, rows):
      slot, start, last = rows['slot'][0], rows['start'], rows['last'][0]
      row = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1, 0), texts)
      positions = Positions(start[:, None] + jnp.arange(rows['tokens'].shape[1]), cached=start)
      hidden, cache, _ = module.hidden(rows['tokens'], positions, row.cache)
      following = rows['following'][0]
      if not scored:
        hidden, following, last = jax.lax.dynamic_slice_in_dim(hidden, last, 1, 0), jax.lax.dynamic_slice_in_dim(following, last, 1, 0), 0
      logits = logits_of(module.head, hidden)
      ids = draw(jax.lax.dynamic_slice_in_dim(logits, last, 1, 0), row.prompted, row.counts, row.bias, rows)
      following = jnp.where((jnp.arange(len(following)) == last) & rows['ends'], ids, following)
      row = row._replace(cache=cache, counts=row.counts.at[0, ids[0]].add(rows['ends'][0].astype(jnp.int32)))
      put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, 0)
      return jax.tree.map(put, texts, row), jax.tree.map(lambda x: x[None], _known(logits, following))
    return run(step, (specs, BATCH_SPEC), parameters, texts, rows)

  @functools.partial(jax.jit, donate_argnames='texts')
  def decode(parameters, texts, rows):
    def step(module, texts, rows):
      hidden, cache, _ = module.hidden(rows['token'][:, None], Positions(rows['start'][:, None], cached=rows['start']), texts.cache)
      logits = logits_of(module.head, hidden)
      ids = draw(logits, texts.prompted, texts.counts, texts.bias, rows)
      is_active = rows['start'] < cache[0].keys.shape[2]  # the prompts of others are still being read
      counts = texts.counts.at[jnp.arange(local), ids].add(is_active.astype(jnp.int32))
      return texts._replace(cache=cache, counts=counts), _known(logits, ids)
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


def _changed(logits: Float[Array, 'B V'], prompted: Bool[Array, 'B V'], counts: Int[Array, 'B V'], bias: Float[Array, 'B V'],
             rows: dict[str, Array]) -> Float[Array, 'B V']:
  """Logits after the penalties and biases of each row."""
  logits = penalized(logits, prompted | (counts > 0), rows['repetition_penalty'])
  column = lambda name: rows[name][:, None]
  return logits + bias - column('frequency_penalty') * counts - column('presence_penalty') * (counts > 0)


def _known(logits, ids) -> Drawn:
  """What the model, by its logits [T, V], knows of the tokens [T]."""
  logprobs = jax.nn.log_softmax(logits)
  best_logprobs, best = jax.lax.top_k(logprobs, min(ALTERNATIVES, logits.shape[-1]))
  return Drawn(ids, jnp.take_along_axis(logprobs, ids[:, None], -1)[:, 0], best, best_logprobs)  # type: ignore[arg-type]
