"""Token by token: prompts into a key/value cache, then one more token of each row at a time."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gptjax.inference.sampling import Sampling, penalized, sample
from gptjax.model import Blueprint, Caches, Parameters, Place, blueprint, empty_cache
from gptjax.sharding import my_rows, place_rows, row_groups, spec


class Drawn(NamedTuple):
  """A token of each row."""

  ids: Int[Array, 'B']
  logprobs: Float[Array, 'B']
  """of the model itself, in nats, whatever it was drawn from"""


class _State(NamedTuple):
  """What the next step of a batch needs."""

  cache: Caches
  filled: Int[Array, '']
  """tokens of each row that the cache has read, padding included"""
  first: Int[Array, 'B']
  """padding before each row"""
  drawn: Int[Array, '']
  """tokens drawn"""
  token: Int[Array, 'B']
  """the last one, which the model has not read"""
  seeds: Int[Array, 'B']
  seen: Bool[Array, 'B V'] | None
  """ids that each row's text has, where that matters"""


class Decoder:
  """Continues batches of prompts. One program reads prompts and one draws, for each bucket of shapes.

  Prompts of unequal length are padded at their beginning, so that all rows draw together; nothing sees the padding. A row's tokens
  depend on its prompt and its seed alone, not on the rows beside it. Layers are run one by one, whether they were trained in a scan
  or not: a step reads every weight once, and slicing stacked ones would copy them.

  Args:
    blueprint: of the model.
    mesh: where the parameters lie; its data axes share out the rows.
    forbidden: ids never drawn, such as padding.
    zero_stage: at which `prepare` lays the parameters out. 0: a whole copy for each device of `data`, the fastest to read; 3: in
      parts, gathered layer by layer, for models that are too large for that.
  """

  def __init__(self, blueprint: Blueprint, mesh: Mesh, forbidden: tuple[int, ...] = (), zero_stage: int = 0):
    self._given, self._mesh = blueprint, mesh
    self._plan = _unrolled(blueprint)
    self._forbidden = np.zeros(blueprint.config.table_rows, bool)
    self._forbidden[list(forbidden)] = True
    self._prepare = jax.jit(self._unstacked, out_shardings=self._plan.shardings(zero_stage, mesh))
    self._prefill = jax.jit(self._prefill_step, static_argnames=('room', 'sampling'))
    self._decode = jax.jit(self._decode_step, static_argnames='sampling', donate_argnames='state')

  def prepare(self, parameters: Parameters) -> Parameters:
    """Parameters as decoding reads them: layer by layer, transposed, in the type that computes."""
    return self._prepare(parameters)

  def __call__(self, parameters: Parameters, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int],
               most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields ids [B] and their log-probabilities [B], `most` times at the most.

    A text may outgrow the context: then the model goes on from the later half of it.

    Args:
      parameters: that `prepare` made.
      prompts: ids of each row, one or more.
      sampling: how tokens are drawn.
      seeds: of each row's draws.
      most: tokens to add.
    """
    assert all(prompts) and len(seeds) == len(prompts) and most > 0, 'a prompt has at least its bos'
    count, context = len(prompts), self._plan.context
    texts = [list(prompt) for prompt in prompts]
    windows = [len(text) if len(text) <= context else context for text in texts]  # tokens of each that the model sees
    drawn = 0
    while drawn < most:
      room = min(most - drawn, context - max(windows) + 1)
      rows = [text[-window:] for text, window in zip(texts, windows, strict=True)]
      state, out = self._start(parameters, rows, texts, seeds, drawn, min(bucket(room), context), sampling)
      for left in reversed(range(room)):
        # The next step is on its way before this one's tokens are looked at.
        state, following = self._decode(parameters, state, sampling=sampling) if left else (None, None)
        ids, logprobs = (np.asarray(x)[:count] for x in out)
        drawn, out = drawn + 1, following
        for text, token in zip(texts, ids.tolist(), strict=True):
          text.append(token)
        yield ids, logprobs
      windows = [window + room if window + room <= context else max(context // 2, 1) for window in windows]

  def _start(self, parameters, rows, texts, seeds, drawn, room, sampling):
    shared = row_groups(self._mesh)
    batch = -(-_power(len(rows)) // shared) * shared
    length = min(bucket(max(map(len, rows))), self._plan.context)
    tokens = np.zeros((batch, length), np.int32)
    first = np.full(batch, length - 1, np.int32)
    for index, row in enumerate(rows):
      tokens[index, length - len(row):] = row
      first[index] = length - len(row)
    every = np.zeros(batch, np.uint32)
    every[:len(seeds)] = seeds
    seen = None
    if sampling.repetition_penalty != 1:
      seen = np.zeros((batch, self._plan.config.table_rows), bool)
      for index, text in enumerate(texts):
        seen[index, text] = True
    mine = my_rows(self._mesh, batch)
    placed = place_rows(self._mesh, {'tokens': tokens[mine]}, batch)['tokens']
    return self._prefill(parameters, placed, first, every, seen, np.int32(drawn), room=room, sampling=sampling)

  def _prefill_step(self, parameters, tokens, first, seeds, seen, count, *, room, sampling):
    model = self._plan.merge(parameters)
    batch, length = tokens.shape
    rows = jax.reshard(first, spec('batch'))
    index = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1, out_sharding=spec('batch', None))
    real = index >= rows[:, None]
    place = Place(jnp.maximum(index - rows[:, None], 0), real.astype(jnp.int32))
    hidden, cache = model.hidden(tokens, place, empty_cache(self._plan.config, batch, length + room))
    last = jax.lax.reshape(hidden, (batch, length, hidden.shape[-1]), out_sharding=spec('batch', None, 'embed'))[:, -1]
    state = _State(cache, jnp.int32(length), rows, count, tokens[:, -1], seeds, seen)
    return self._draw(model, last, state, sampling)

  def _decode_step(self, parameters, state, *, sampling):
    model = self._plan.merge(parameters)
    place = Place((state.filled - state.first)[:, None], filled=state.filled, first=state.first)
    hidden, cache = model.hidden(state.token[:, None], place, state.cache)
    return self._draw(model, hidden, state._replace(cache=cache, filled=state.filled + 1), sampling)

  def _draw(self, model, hidden, state, sampling):
    # Every device draws every row, and so the same.
    logits = jax.reshard(model.logits(hidden), PartitionSpec(None, None))
    logprobs = jax.nn.log_softmax(logits)
    logits = jnp.where(self._forbidden, -jnp.inf, logits)
    if state.seen is not None:
      logits = penalized(logits, state.seen, sampling)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), state.drawn))(state.seeds)
    ids = sample(logits, sampling, keys).astype(jnp.int32)
    seen = state.seen
    if seen is not None:
      seen = seen | (ids[:, None] == jnp.arange(seen.shape[1]))
    out = Drawn(ids, jnp.take_along_axis(logprobs, ids[:, None], -1)[:, 0])
    return state._replace(token=jax.reshard(ids, spec('batch')), drawn=state.drawn + 1, seen=seen), out

  def _unstacked(self, parameters):
    if self._given.config.scan:
      layers = {f'blocks/{layer}/{name.removeprefix("blocks/")}': value[layer] for name, value in parameters.items()
                if name.startswith('blocks/') for layer in range(self._given.config.layers)}
      parameters = {name: value for name, value in parameters.items() if not name.startswith('blocks/')} | layers
    return {name: (parameters[name].T if name.endswith('kernel') else parameters[name]).astype(dtype)
            for name, dtype in self._plan.dtypes.items()}


decoder = functools.lru_cache(maxsize=8)(Decoder)
"""A Decoder, the same one for equal arguments: it keeps the programs that it compiled."""


@functools.lru_cache(maxsize=16)
def _unrolled(plan: Blueprint) -> Blueprint:
  """The same model with its layers one by one, and kernels as few rows read them best."""
  config = dataclasses.replace(plan.config, attention='auto', scan=False, remat='none', saved=(), offloaded=(), sequence_parallel=False,
                               dropout=0.0)
  return blueprint(config, plan.context).transposed()


def _power(n: int) -> int:
  """The next power of two."""
  return 1 << (n - 1).bit_length()


def bucket(n: int) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: shapes that programs are compiled for."""
  power = max(_power(n), 16)
  return power * 3 // 4 if 16 < power and n <= power * 3 // 4 else power
