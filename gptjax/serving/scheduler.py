"""Continuous batching: requests wait for slots; their prompts are read piece by piece between steps that draw a token for every text."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from gptjax.data import TextStream, Tokenizer
from gptjax.inference import Text
from gptjax.serving.engine import Drawn, Engine, Settings, Slot


@dataclasses.dataclass(frozen=True)
class Token:
  """A token, and what the model knew of its place."""

  id: int
  logprob: float | None
  """in nats; None: of the first token of a prompt"""
  best_ids: Sequence[int] = ()
  """the most likely ids"""
  best_logprobs: Sequence[float] = ()

  def best(self, most: int) -> list[tuple[int, float]]:
    """The most likely ids with their log-probabilities."""
    return [*zip(self.best_ids[:most], self.best_logprobs[:most])]


@dataclasses.dataclass(frozen=True)
class Piece:
  """News of a text."""

  text: str = ''
  """that became final"""
  tokens: tuple[Token, ...] = ()
  """new ones; their text may become final later"""
  ended: str = ''
  """why the text has ended: 'stop' or 'length'; 'error' with the reason as text"""


@dataclasses.dataclass(eq=False)
class Request:
  """A prompt, and how to continue it."""

  prompt: Sequence[int]
  """at least one id, and no more than the context"""
  max_tokens: int
  """0: only the prompt is scored"""
  settings: Settings
  seed: int
  stop: tuple[str, ...]
  stop_ids: frozenset[int]
  bias: dict[int, float]
  scored: bool
  """whether the tokens of the prompt are to be reported too"""
  top_logprobs: bool
  """whether the most likely tokens of each place are to be reported"""
  send: Callable[[Piece], None]
  """is called in the scheduler's thread"""
  cancelled: bool = False
  """set by whoever no longer listens"""


class Full(Exception):
  """No more requests can wait."""


class _Active:
  """A request that has a slot."""

  def __init__(self, request: Request, slot: int, tokenizer: Tokenizer):
    self.request, self.slot = request, slot
    continues = any(tokenizer.pieces[i] for i in request.prompt)
    self.text = Text(TextStream(tokenizer, continues), request.stop, set(request.stop_ids))


class Scheduler:
  """Runs an engine in the thread that calls `run`.

  Args:
    waiting: requests that may wait for a slot.
  """

  def __init__(self, engine: Engine, tokenizer: Tokenizer, waiting: int):
    self._engine, self._tokenizer, self._limit = engine, tokenizer, waiting
    self._waiting: collections.deque[Request] = collections.deque()
    self._active: dict[int, _Active] = {}
    self._used = dict.fromkeys(range(len(engine.slots)), 0.0)
    """when the last text of each slot ended"""
    self._news: list[tuple[Request, Piece]] = []
    """that are sent while the device draws the next tokens"""
    self._change, self._stopping = threading.Condition(), False
    self.error = ''
    """why no request can be served any more"""
    self.counts: collections.Counter[str] = collections.Counter()
    """of requests by their ends, and of tokens: read, reused and drawn"""

  @property
  def running(self) -> int:
    """Requests that have slots."""
    return len(self._active)

  @property
  def waiting(self) -> int:
    """Requests that wait for one."""
    return len(self._waiting)

  def submit(self, requests: Sequence[Request]) -> None:
    """Takes requests, all or none: raises Full."""
    with self._change:
      if len(self._waiting) + len(requests) > self._limit:
        raise Full
      self._waiting.extend(requests)
      self._change.notify()

  def stop(self) -> None:
    """Makes `run` return after the current step."""
    with self._change:
      self._stopping = True
      self._change.notify()

  def run(self) -> None:
    """Serves requests until `stop`. An error of the engine ends all requests, and is raised."""
    try:
      while True:
        with self._change:
          while not (self._waiting or self._active or self._stopping):
            self._change.wait()
          if self._stopping:
            self.error = 'the server stops'
            return
          admitted = list(self._admissions())
        for request, slot, kept in admitted:
          self._admit(request, slot, kept)
        self._step()
    except BaseException as error:
      self.error = f'{type(error).__name__}: {error}'
      raise
    finally:
      self._send()
      with self._change:
        for request in [*self._waiting, *(one.request for one in self._active.values())]:
          request.send(Piece(self.error, ended='error'))
        self._waiting.clear()
        self._active.clear()

  def _admissions(self) -> Iterable[tuple[Request, int, int]]:
    """Requests that get slots: each one of those whose last text begins like its prompt, or else that was free for the longest time."""
    free = [slot for slot in self._used if slot not in self._active]
    while self._waiting and free:
      request = self._waiting.popleft()
      if request.cancelled:
        self.counts['cancelled'] += 1
        continue
      shared = {slot: 0 if request.scored else _common(self._engine.slots[slot], request.prompt) for slot in free}
      slot = max(free, key=lambda slot: (shared[slot], -self._used[slot]))
      free.remove(slot)
      yield request, slot, shared[slot]

  def _admit(self, request: Request, slot: int, kept: int) -> None:
    self._engine.admit(slot, request.prompt, kept, request.settings, request.seed, request.bias, request.top_logprobs)
    self._active[slot] = _Active(request, slot, self._tokenizer)
    self.counts['reused'] += kept
    if request.scored:
      self._news.append((request, Piece(tokens=(Token(request.prompt[0], None),))))

  def _step(self) -> None:
    for one in [one for one in self._active.values() if one.request.cancelled]:
      self._leave(one, 'cancelled')
    self._read()
    if drawing := [one for one in self._active.values() if not self._engine.slots[one.slot].unread]:
      found = self._engine.decode([one.slot for one in drawing], self._send)
      for one in drawing:
        self._draw(one, _tokens(found[one.slot], one.request.top_logprobs)[0])
    if not (drawing and self._active):
      self._send()

  def _read(self) -> None:
    """Reads pieces of prompts that are all scored, or none of which is."""
    unread = lambda one: len(self._engine.slots[one.slot].unread)
    waiting = {one.slot: one for one in self._active.values() if unread(one)}
    if not waiting:
      return
    scored = next(iter(waiting.values())).request.scored
    before = sum(map(unread, waiting.values()))
    found = self._engine.read([slot for slot, one in waiting.items() if one.request.scored == scored], scored, self._send)
    self.counts['read'] += before - sum(map(unread, waiting.values()))
    for slot, drawn in found.items():
      one, tokens = waiting[slot], () if drawn is None else _tokens(drawn, waiting[slot].request.top_logprobs)
      if scored:
        self._news.append((one.request, Piece(tokens=tokens if unread(one) else tokens[:-1])))
      if not unread(one) and one.request.max_tokens:
        self._draw(one, tokens[-1])
      elif not unread(one):
        self._news.append((one.request, Piece(ended='length')))
        self._leave(one, 'length')

  def _draw(self, one: _Active, token: Token) -> None:
    request, text = one.request, one.text
    self.counts['drawn'] += 1
    piece = text.push(token.id, token.logprob or 0.0)
    if text.ended == 'length' and len(text.ids) == request.max_tokens:
      piece += text.finish()
      ended = 'stop' if text.ended == 'text' else 'length'
    else:
      ended = '' if text.ended == 'length' else 'stop'
    self._news.append((request, Piece(piece, (token,), ended)))
    if ended:
      self._leave(one, ended)

  def _send(self) -> None:
    for request, piece in self._news:
      request.send(piece)
    self._news.clear()

  def _leave(self, one: _Active, why: str) -> None:
    self._used[one.slot] = time.monotonic()
    self.counts[why] += 1
    del self._active[one.slot]


def _common(slot: Slot, prompt: Sequence[int]) -> int:
  """How many tokens of a prompt, without its last one, a slot has read already."""
  count = min(len(slot.tokens), len(prompt) - 1)
  differing = np.flatnonzero(np.array(slot.tokens[:count]) != np.array(prompt[:count]))
  return int(differing[0]) if len(differing) else count


def _tokens(found: Drawn, top_logprobs: bool) -> tuple[Token, ...]:
  return tuple(Token(*parts) for parts in zip(*(part.tolist() for part in (found if top_logprobs else found[:2]))))
