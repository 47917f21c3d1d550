"""Completions that a model draws for prompts, and the batches that they become: a step's rows, for policy gradients.

Row i of a run is completion i % group of prompt i // group, a function of the seed, i, and the parameters at the first step of its
rollout. So a run resumes anywhere; inside of a rollout it reads the rest of it from a file.
"""

import contextlib
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, UserError
from gptjax.data import Batch, Prepared, Tokenizer
from gptjax.data.rows import mix
from gptjax.distributed import broadcast, is_primary
from gptjax.files import atomic_file
from gptjax.inference import Sampling
from gptjax.inference.decoding import Decoder
from gptjax.inference.sampling import suppressed_ids
from gptjax.model import AbstractModel, Parameters
from gptjax.sharding import process_rows
from gptjax.training.policy import advantages, spread, token_weights
from gptjax.training.reference import reference_of
from gptjax.training.rewards import Rewards, rewarded
from gptjax.training.run import Run
from gptjax.training.step import TrainState

FILE = 'rollout-{}.npz'
"""In a workdir, of a rollout of several steps, by its first row."""


class Prompt(NamedTuple):
  """A prompt and its answer in the data."""

  ids: list[int]
  row: dict[str, Any]
  """prompt and answer as texts"""


def prompts_of(batch: Batch, tokenizer: Tokenizer) -> Iterator[Prompt]:
  """The examples of some rows, in order: the answer is the last one of a conversation, and the prompt everything before it."""
  for tokens, targets, mask, segments in zip(*(batch[name] for name in ('tokens', 'targets', 'mask', 'segments')), strict=True):
    for number in range(1, segments.max() + 1):
      here = np.flatnonzero(segments == number)
      answered = np.flatnonzero(mask[here] > 0)
      if len(answered):
        if not answered[0]:
          raise UserError('data', tokenizer.decode(tokens[here].tolist())[:60], 'examples with a prompt before what is a target')
        first = answered[np.flatnonzero(np.diff(answered, prepend=-2) > 1)[-1]]  # of the last run of targets
        ids, answer = tokens[here[:first + 1]].tolist(), targets[here[first:answered[-1] + 1]].tolist()
        yield Prompt(ids, {'prompt': tokenizer.decode(ids), 'answer': tokenizer.decode([x for x in answer if x not in tokenizer.stop_ids])})


class Completions(NamedTuple):
  """Completions of prompts, with the id that ended each."""

  ids: list[list[int]]
  logprobs: list[list[float]]
  """of each id when it was drawn, in nats"""
  ended: np.ndarray
  """[n], bool; the others were cut"""
  texts: list[str]


class Drawing:
  """Draws completions at temperature 1, or the most likely ones, up to a limit of tokens."""

  def __init__(self, model: AbstractModel, mesh: Mesh, tokenizer: Tokenizer, zero_stage: int, limit: int, batch_size: int,
               progress: Callable[[int], None]):
    self._decoder = Decoder(model, mesh, suppressed_ids(tokenizer, model.config), zero_stage)
    self._tokenizer, self._limit, self._batch_size, self._progress = tokenizer, limit, batch_size, progress
    self.prepare = self._decoder.prepare

  def __call__(self, parameters: Parameters, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float = 1.0) -> Completions:
    """The completion of each prompt, drawn with its seed, some prompts at a time."""
    parts = [self._draw(parameters, prompts[at:at + self._batch_size], seeds[at:at + self._batch_size], temperature)
             for at in range(0, len(prompts), self._batch_size)]
    together = lambda name: [one for part in parts for one in getattr(part, name)]
    return Completions(together('ids'), together('logprobs'), np.array(together('ended')), together('texts'))

  def _draw(self, parameters: Parameters, prompts: Sequence[list[int]], seeds: Sequence[int], temperature: float) -> Completions:
    found, ended = [], np.zeros(len(prompts), bool)
    for ids, logprobs in self._decoder(parameters, prompts, Sampling(temperature=temperature), seeds, self._limit):
      found.append((ids, logprobs))
      ended |= np.isin(ids, self._tokenizer.stop_ids)
      if ended.all():
        break
    self._progress(0)
    ids, logprobs = (np.stack(part, 1) for part in zip(*found, strict=True))
    stops = np.isin(ids, self._tokenizer.stop_ids)
    lengths = np.where(ended, stops.argmax(1) + 1, ids.shape[1])
    rows = [row[:count].tolist() for row, count in zip(ids, lengths, strict=True)]
    return Completions(rows, [row[:count].tolist() for row, count in zip(logprobs, lengths, strict=True)], ended,
                       [self._tokenizer.decode(row[:-1] if end else row) for row, end in zip(rows, ended, strict=True)])


def seeds_of(seed: int, first: int, count: int) -> list[int]:
  """Seeds of the completions from number `first` on."""
  numbers = np.arange(first, first + count, dtype=np.uint64)
  return (mix(mix(np.full(1, seed, np.uint64)) + numbers) >> np.uint64(32)).tolist()


def judged(functions: Rewards, prompts: Sequence[Prompt], drawn: Completions, limit: int) -> dict[str, np.ndarray]:
  """The value of each reward of each completion [n]; functions are called in process 0 alone."""
  values = None
  if is_primary():
    each = [rewarded(functions, {**prompt.row, 'tokens': len(ids), 'limit': limit}, text)
            for prompt, ids, text in zip(prompts, drawn.ids, drawn.texts, strict=True)]
    values = {name: [None if math.isnan(one[name]) else one[name] for one in each] for name in functions}
  return {name: np.array(found, float) for name, found in broadcast('rewards', values).items()}


class Rollouts:
  """The batches of completions, each with the rows of this process.

  Raises a UserError for a prompt without space for objective.max_tokens in a row.
  """

  def __init__(self, run: Run, data: Prepared, workdir: Path, rewards: Rewards, progress: Callable[[int], None], writes: bool):
    self._run, self._tokenizer, self._workdir = run, data.tokenizer, workdir
    self._writes = writes and run.config.objective.rollout_steps > 1
    settings, standard = run.config.objective, run.standard
    self._functions = rewards
    self._drawing = Drawing(standard.model.base, standard.mesh, data.tokenizer, standard.zero_stage, settings.max_tokens,
                            run.config.microbatch_size, progress)
    self._reference = reference_of(run, workdir) if settings.kl else None
    self._size = run.config.batch_size * settings.rollout_steps
    self._mine = process_rows(run.mesh, run.config.batch_size)

  def __call__(self, row: int, state: Callable[[], TrainState]) -> Generator[Batch, None, None]:
    """The batches from a row on."""
    size = self._run.config.batch_size
    first = row // self._size * self._size if self._size > size else row
    rows = self._kept(first) if row > first else None
    while True:
      if rows is None:
        rows = self._drawn(first, state().parameters)
      for start in range(row - first, self._size, size):
        yield {name: values[start + self._mine] for name, values in rows.items()}
      first += self._size
      row, rows = first, None

  def _drawn(self, first: int, parameters: Parameters) -> Batch:
    """The rows of the rollout that begins at row `first`."""
    run, settings = self._run, self._run.config.objective
    group = settings.rows_per_example
    numbers = np.arange(first // group, (first + self._size) // group)
    each = list(prompts_of(run.rows.batch(numbers), self._tokenizer))
    if len(each) < len(numbers):
      raise UserError('data', self._run.rows.layouts[0].store.location, 'examples with targets: the weights of all answers of one are 0')
    for prompt in each:
      check_space(prompt, run.config, settings.max_tokens)
    prompts = [prompt for prompt in each for _ in range(group)]
    with jax.set_mesh(run.standard.mesh):
      weights = self._drawing.prepare(run.standard.model.merged(run.standard.parameters(parameters)))
      drawn = self._drawing(weights, [prompt.ids for prompt in prompts], seeds_of(run.config.seed, first, self._size))
    del weights
    rows = self._rows(prompts, drawn)
    if settings.kind == 'grpo':
      self._judge(rows, drawn, judged(self._functions, prompts, drawn, settings.max_tokens))
    else:  # per token
      rows['metric/truncated'] = rows['mask'] * ~drawn.ended[:, None]
    if self._reference:
      rows['reference'] = self._reference(rows)
    if self._writes:
      if is_primary():
        self._remove_unneeded()
        with atomic_file(self._workdir / FILE.format(first)) as partial, partial.open('wb') as file:
          arrays: dict[str, Any] = {name.replace('/', '|'): values for name, values in rows.items()}
          np.savez(file, first_row=first, **arrays)
      broadcast('rollout')
    return rows

  def _rows(self, prompts: Sequence[Prompt], drawn: Completions) -> Batch:
    """Prompts with their completions, whose tokens are the targets."""
    context, count = self._run.config.data.context, len(prompts)
    zeros = lambda kind=np.float32: np.zeros((count, context), kind)
    rows: dict[str, np.ndarray] = {name: zeros(np.int32) for name in ('tokens', 'targets', 'segments')}
    rows |= {name: zeros() for name in ('mask', 'old', 'first')}
    rows['positions'] = np.broadcast_to(np.arange(context, dtype=np.int32), (count, context)).copy()
    for index, (prompt, ids, logprobs) in enumerate(zip(prompts, drawn.ids, drawn.logprobs, strict=True)):
      text, start = prompt.ids + ids, len(prompt.ids) - 1
      rows['tokens'][index, :len(text) - 1], rows['targets'][index, :len(text) - 1] = text[:-1], text[1:]
      rows['segments'][index, :len(text) - 1] = 1
      rows['mask'][index, start:len(text) - 1] = 1
      rows['old'][index, start:len(text) - 1] = logprobs
      rows['first'][index, start] = 1
    return rows

  def _judge(self, rows: Batch, drawn: Completions, rewards: Mapping[str, np.ndarray]) -> None:
    """Adds advantages, weights and metrics."""
    settings = self._run.config.objective
    loss = settings.loss or 'grpo'
    totals = np.asarray(sum(reward.weight * rewards[reward.name] for reward in settings.rewards)).reshape(-1, settings.group)
    if not settings.count_truncated:
      rows['mask'] *= drawn.ended[:, None]
    rows['weight'] = np.concatenate([token_weights(mask, loss, settings.max_tokens)
                                     for mask in np.split(rows['mask'], settings.rollout_steps)])
    rows['advantage'] = (rows['mask'] * advantages(totals, loss).reshape(-1, 1)).astype(np.float32)
    deviation = np.repeat(spread(totals), settings.group)
    figures = {'reward': totals.reshape(-1), **{f'reward_{name}': values for name, values in rewards.items()}, 'reward_std': deviation,
               'groups_without_spread': deviation == 0, 'truncated': ~drawn.ended}
    rows |= {f'metric/{name}': rows['first'] * np.nan_to_num(values).astype(np.float32)[:, None] for name, values in figures.items()}

  def _kept(self, first: int) -> Batch:
    """The rows of a rollout that was drawn before this process began."""
    path = self._workdir / FILE.format(first)
    try:
      with np.load(path) as found:
        rows = {name.replace('|', '/'): found[name] for name in found.files}
    except (OSError, ValueError):
      rows = {}
    if rows.pop('first_row', -1) != first or len(rows['tokens']) != self._size:
      raise UserError('checkpoint', str(path), f'the completions from row {first:,} on, in whose rollout the run stopped; batch_size and '
                      'objective.rollout_steps as they were then')
    return rows

  def _remove_unneeded(self) -> None:
    """Removes rollouts in which no checkpoint lies."""
    checkpoints = Checkpoints(self._workdir / 'checkpoints')
    with contextlib.suppress(UserError):  # a damaged checkpoint; it is reported elsewhere
      needed = {checkpoints.progress(step).rows // self._size * self._size for step in checkpoints.steps()}
      for path in self._workdir.glob(FILE.format('*')):
        if int(path.stem.rpartition('-')[2]) < min(needed, default=0):
          path.unlink(missing_ok=True)


def check_space(prompt: Prompt, config: Config, max_tokens: int) -> None:
  """Raises a UserError for a prompt after which so many tokens do not fit into a row."""
  if (needed := len(prompt.ids) - 1 + max_tokens) > config.data.context:
    raise UserError('data.context', config.data.context, f'{needed} or more, for a prompt of {len(prompt.ids)} tokens and completions of '
                    f'{max_tokens}: {json.dumps(prompt.row["prompt"])[:60]}')
