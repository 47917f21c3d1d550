"""Token by token: prompts into a key/value cache, then one more token of each row at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from gptjax.config import ComputeConfig
from gptjax.inference.sampling import Sampling, penalized, sample
from gptjax.model import AbstractModel, Caches, Parameters, Positions, abstract_model, empty_cache, left_padded, unstack_layers
from gptjax.sharding import ROWS, Zero, local_rows, put_rows, process_rows, row_groups


class Drawn(NamedTuple):
  """A token of each row."""

  ids: Int[Array, 'B']
  logprobs: Float[Array, 'B']
  """of the model itself, in nats, whatever it was drawn from"""


class _State(NamedTuple):
  """What the next step of a batch needs."""

  cache: Caches
  cached: Int[Array, '']
  """tokens per row in the cache, padding included"""
  padding: Int[Array, 'B']
  """tokens of padding before each row"""
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
    model: whose layers may be stacked or not.
    mesh: of the parameters; each group of its devices decodes rows of its own.
    forbidden: ids never drawn, such as padding.
    zero_stage: at which `prepare` stores the parameters. 0: a complete copy for each group of rows, the fastest to read; 3: in
      shards, gathered layer by layer, for models that are too large for that.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, forbidden: tuple[int, ...] = (), zero_stage: int = 0):
    self._mesh, self._plan = mesh, _unrolled(model)
    self._programs = _programs(self._plan, mesh, forbidden, zero_stage)

  def prepare(self, parameters: Parameters) -> Parameters:
    """Parameters as decoding reads them: layer by layer, transposed, in the type that computes."""
    return self._programs.prepare(parameters)

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
        state, following = self._programs.decode(parameters, state, sampling=sampling) if left else (None, None)
        ids, logprobs = (np.asarray(x)[:count] for x in out)
        drawn, out = drawn + 1, following
        for text, token in zip(texts, ids.tolist(), strict=True):
          text.append(token)
        yield ids, logprobs
      windows = [window + room if window + room <= context else max(context // 2, 1) for window in windows]

  def _start(self, parameters, rows, texts, seeds, drawn, room, sampling):
    groups = row_groups(self._mesh)
    batch = -(-_power(len(rows)) // groups) * groups
    length = min(bucket(max(map(len, rows))), self._plan.context)
    tokens = np.zeros((batch, length), np.int32)
    padding = np.full(batch, length - 1, np.int32)
    for index, row in enumerate(rows):
      tokens[index, length - len(row):] = row
      padding[index] = length - len(row)
    every = np.zeros(batch, np.uint32)
    every[:len(seeds)] = seeds
    given = {'tokens': tokens, 'padding': padding, 'seeds': every}
    if sampling.repetition_penalty != 1:
      given['seen'] = np.zeros((batch, self._plan.config.table_rows), bool)
      for index, text in enumerate(texts):
        given['seen'][index, text] = True
    mine = process_rows(self._mesh, batch)
    placed = put_rows(self._mesh, {name: values[mine] for name, values in given.items()}, batch)
    return self._programs.prefill(parameters, placed, np.int32(drawn), room=room, sampling=sampling)


class _Programs(NamedTuple):
  """The compiled functions of a decoder."""

  prepare: Callable
  """(parameters) -> parameters as the other two read them"""
  prefill: Callable
  """(parameters, rows, drawn, room=, sampling=) -> (state, first tokens)"""
  decode: Callable
  """(parameters, state, sampling=) -> (state, next tokens)"""


@functools.lru_cache(maxsize=16)
def _programs(model: AbstractModel, mesh: Mesh, forbidden: tuple[int, ...], zero_stage: int) -> _Programs:
  """The compiled functions, equal for equal arguments. All results of rows are replicated, so that every process reads all of them."""
  zero = model.zero(zero_stage, mesh)
  banned = np.zeros(model.config.table_rows, bool)
  banned[list(forbidden)] = True
  one: Any = PartitionSpec()
  rows_first: Any = ROWS
  state_specs = _State(rows_first, one, rows_first, one, rows_first, rows_first, rows_first)

  def draw(head, hidden, state, sampling):
    logits = jax.reshard(head.logits(hidden), PartitionSpec(None, None))
    logprobs = jax.nn.log_softmax(logits)
    logits = jnp.where(banned, -jnp.inf, logits)
    if state.seen is not None:
      logits = penalized(logits, state.seen, sampling)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), state.drawn))(state.seeds)
    ids = sample(logits, sampling, keys).astype(jnp.int32)
    seen = None if state.seen is None else state.seen | (ids[:, None] == jnp.arange(state.seen.shape[1]))
    return state._replace(token=ids, drawn=state.drawn + 1, seen=seen), Drawn(ids, jnp.take_along_axis(logprobs, ids[:, None], -1)[:, 0])

  def prefilled(entered, rows, drawn, *, room, sampling):
    module, (batch, length) = _module(model, zero, entered), rows['tokens'].shape
    cache = empty_cache(model.config, model.compute, batch, length + room)
    hidden, cache, _ = module.hidden(rows['tokens'], left_padded(length, rows['padding']), cache)
    state = _State(cache, jnp.int32(length), rows['padding'], drawn, rows['tokens'][:, -1], rows['seeds'], rows.get('seen'))
    return draw(module.head, hidden.reshape(batch, length, -1)[:, -1], state, sampling)

  def decoded(entered, state, *, sampling):
    module = _module(model, zero, entered)
    positions = Positions((state.cached - state.padding)[:, None], cached=state.cached, padding=state.padding)
    hidden, cache, _ = module.hidden(state.token[:, None], positions, state.cache)
    return draw(module.head, hidden, state._replace(cache=cache, cached=state.cached + 1), sampling)

  def region(function, in_specs, settings):
    run = local_rows(functools.partial(function, **settings), (zero.in_specs, *in_specs), (state_specs, ROWS))

    def on_all_rows(parameters, *inputs):
      state, drawn = run(zero.enter(parameters), *inputs)
      return state, jax.reshard(drawn, PartitionSpec(None))
    return on_all_rows

  @functools.partial(jax.jit, static_argnames=('room', 'sampling'))
  def prefill(parameters, rows, drawn, room, sampling):
    return region(prefilled, (ROWS, PartitionSpec()), {'room': room, 'sampling': sampling})(parameters, rows, drawn)

  @functools.partial(jax.jit, static_argnames='sampling', donate_argnames='state')
  def decode(parameters, state, sampling):
    return region(decoded, (state_specs,), {'sampling': sampling})(parameters, state)

  prepare = jax.jit(functools.partial(_prepared, model), out_shardings=model.shardings(zero_stage, mesh))
  return _Programs(prepare, prefill, decode)


def _module(model: AbstractModel, zero: Zero, entered: Parameters):
  return model.merge(zero.weights(entered, differentiated=False))


def _prepared(model: AbstractModel, parameters: Parameters) -> Parameters:
  """Parameters as decoding reads them: layer by layer, transposed, in the dtype that computes."""
  parameters = unstack_layers(parameters)
  return {name: (parameters[name].T if name.endswith('kernel') else parameters[name]).astype(dtype) for name, dtype in model.dtypes.items()}


def _unrolled(model: AbstractModel) -> AbstractModel:
  """The same model with its layers one by one, and kernels as few rows read them best."""
  config, compute = dataclasses.replace(model.config, dropout=0.0), ComputeConfig(dtype=model.compute.dtype)
  return abstract_model(config, compute, model.context).transposed()


def _power(n: int) -> int:
  """The next power of two."""
  return 1 << (n - 1).bit_length()


def bucket(n: int) -> int:
  """The next of 16, 24, 32, 48, 64, 96, ...: shapes that programs are compiled for."""
  power = max(_power(n), 16)
  return power * 3 // 4 if 16 < power and n <= power * 3 // 4 else power
