"""Decoding token by token: prompts fill a key/value cache, then each step adds one token to every row."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Int

from gptjax.inference.forward import bucket, forward, dispatch_ahead, padded_batch, power_of_two, put_batch
from gptjax.inference.sampling import Sampling, penalized, per_row, sample
from gptjax.model import AbstractModel, Caches, Parameters, Positions, abstract_model, empty_cache, left_padded, unstack_layers
from gptjax.sharding import BATCH_SPEC, padded_batch_size


class _State(NamedTuple):
  """Inputs of the next step of a batch."""

  cache: Caches
  cached: Int[Array, '']
  """tokens per row in the cache, including padding"""
  padding: Int[Array, 'B']
  """tokens of padding before each row"""
  drawn: Int[Array, '']
  """number of tokens drawn"""
  token: Int[Array, 'B']
  """the last one, which the model has not read"""
  seeds: Int[Array, 'B']
  settings: dict[str, Array]
  seen: Bool[Array, 'B V'] | None
  """ids in each row's text, if there is a repetition penalty"""


class Decoder:
  """Continues batches of prompts. For each bucket of shapes one program reads prompts and one draws tokens.

  Prompts of unequal length are padded at their beginning, so that all rows draw together; nothing attends to the padding. The tokens
  of a row depend on its prompt and its seed only, not on other rows. Layers are run one by one even if they are stacked: a step
  reads every weight once, and slices of stacked weights would be copies.

  Args:
    model, mesh: of the parameters; each group of devices decodes different rows.
    forbidden: ids that are never drawn, such as padding.
    zero_stage: at which `prepare` stores the parameters. 0: a complete copy per group of rows, the fastest to read; 3: in shards that
      are gathered layer by layer, for models that are too large for that.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, forbidden: tuple[int, ...] = (), zero_stage: int = 0):
    self._mesh = mesh
    self._model = abstract_model(dataclasses.replace(model.config, dropout=0.0), model.compute.plain, model.context).transposed()
    self._prepare, self._prefill, self._decode = _programs(self._model, mesh, forbidden, zero_stage)

  def prepare(self, parameters: Parameters) -> Parameters:
    """Parameters as decoding reads them: layer by layer, transposed, in the compute dtype."""
    return self._prepare(parameters)

  def __call__(self, parameters: Parameters, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int],
               max_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields ids [B] and their log-probabilities [B] under the model, in nats, `max_tokens` times.

    If a text fills the context, the model continues from its later half.

    Args:
      parameters: from `prepare`.
      prompts: ids of each row, at least one.
      sampling: the distribution of the tokens.
      seeds: random seed of each row.
      max_tokens: tokens to add.
    """
    assert all(prompts) and len(seeds) == len(prompts) and max_tokens > 0, 'a prompt has at least its bos'
    count, context = len(prompts), self._model.context
    texts = [list(prompt) for prompt in prompts]
    windows = [min(len(text), context) for text in texts]  # last tokens of each text that the model reads
    drawn = 0
    while drawn < max_tokens:
      space = min(max_tokens - drawn, context - max(windows) + 1)
      rows = [text[-window:] for text, window in zip(texts, windows, strict=True)]
      batch = self._batch(rows, texts, seeds, sampling)
      for out in dispatch_ahead(self._steps(parameters, batch, drawn, space)):
        ids, logprobs = (np.asarray(x)[:count] for x in out)
        drawn += 1
        for text, token in zip(texts, ids.tolist(), strict=True):
          text.append(token)
        yield ids, logprobs
      windows = [window + space if window + space <= context else max(context // 2, 1) for window in windows]

  def _steps(self, parameters: Parameters, batch: dict[str, jax.Array], drawn: int, space: int) -> Iterator[tuple]:
    length = min(bucket(space), self._model.context)
    state, out = self._prefill(parameters, batch, np.int32(drawn), space=length)
    yield out
    for _ in range(space - 1):
      state, out = self._decode(parameters, state)
      yield out

  def _batch(self, rows: list[list[int]], texts: list[list[int]], seeds: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    count = padded_batch_size(self._mesh, power_of_two(len(rows)))
    batch = padded_batch(rows, count, min(bucket(max(map(len, rows))), self._model.context))
    batch['seeds'] = np.zeros(count, np.uint32)
    batch['seeds'][:len(seeds)] = seeds
    if sampling.repetition_penalty != 1:
      batch['seen'] = np.zeros((count, self._model.config.table_rows), bool)
      for index, text in enumerate(texts):
        batch['seen'][index, text] = True
    return {**put_batch(self._mesh, batch), 'settings': put_batch(self._mesh, per_row(sampling, count))}


@functools.lru_cache(maxsize=16)
def _programs(model: AbstractModel, mesh: Mesh, forbidden: tuple[int, ...], zero_stage: int) -> tuple[Callable, Callable, Callable]:
  """The jitted functions `prepare`, `prefill` and `decode`. The latter two return a _State, and ids and log-probabilities in full."""
  banned = np.zeros(model.config.table_rows, bool)
  banned[list(forbidden)] = True
  one = PartitionSpec()
  specs: Any = _State(BATCH_SPEC, one, BATCH_SPEC, one, *(BATCH_SPEC,) * 4)  # type: ignore[arg-type]

  def run(function, in_specs, parameters, *inputs):
    state, drawn = forward(model, mesh, zero_stage, function, in_specs, (specs, BATCH_SPEC))(parameters, *inputs)
    return state, jax.reshard(drawn, PartitionSpec(None))

  def draw(head, hidden, state):
    logits = jax.reshard(head.logits(hidden), PartitionSpec(None, None))
    logprobs = jax.nn.log_softmax(logits)
    logits = jnp.where(banned, -jnp.inf, logits)
    if state.seen is not None:
      logits = penalized(logits, state.seen, state.settings['repetition_penalty'])
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), state.drawn))(state.seeds)
    ids = sample(logits, state.settings, keys).astype(jnp.int32)
    seen = None if state.seen is None else state.seen | (ids[:, None] == jnp.arange(state.seen.shape[1]))
    return state._replace(token=ids, drawn=state.drawn + 1, seen=seen), (ids, jnp.take_along_axis(logprobs, ids[:, None], -1)[:, 0])

  @functools.partial(jax.jit, static_argnames='space')
  def prefill(parameters, rows, drawn, space):
    def local(module, rows, drawn):
      batch, length = rows['tokens'].shape
      cache = empty_cache(model.config, model.compute, batch, length + space)
      hidden, cache, _ = module.hidden(rows['tokens'], left_padded(length, rows['padding']), cache)
      state = _State(cache, jnp.int32(length), rows['padding'], drawn, rows['tokens'][:, -1], rows['seeds'], rows['settings'],
                     rows.get('seen'))
      return draw(module.head, hidden.reshape(batch, length, -1)[:, -1], state)
    return run(local, (BATCH_SPEC, one), parameters, rows, drawn)

  @functools.partial(jax.jit, donate_argnames='state')
  def decode(parameters, state):
    def local(module, state):
      positions = Positions((state.cached - state.padding)[:, None], cached=state.cached, padding=state.padding)
      hidden, cache, _ = module.hidden(state.token[:, None], positions, state.cache)
      return draw(module.head, hidden, state._replace(cache=cache, cached=state.cached + 1))
    return run(local, (specs,), parameters, state)

  @functools.partial(jax.jit, out_shardings=model.shardings(zero_stage, mesh))
  def prepare(parameters):
    parameters = unstack_layers(parameters)
    is_turned = lambda name: model.variables[name][1].get_metadata('transposed', False)
    turned = {name: value.T if is_turned(name) else value for name, value in parameters.items()}
    return {name: turned[name].astype(dtype) for name, dtype in model.dtypes.items()}

  return prepare, prefill, decode
