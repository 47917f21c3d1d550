"""Text that continues prompts: where it ends, and how it is told as it comes."""

import dataclasses
from collections.abc import Generator as Coroutine
from collections.abc import Sequence
from typing import Literal

from jax.sharding import Mesh

from gptjax.data import TextStream, Tokenizer
from gptjax.inference.decoding import Decoder
from gptjax.inference.prompts import Prompt
from gptjax.inference.sampling import Sampling, never_drawn
from gptjax.model import AbstractModel, Parameters


@dataclasses.dataclass(frozen=True)
class Continuation:
  """What a prompt was continued with."""

  text: str
  """up to a stop string or a stop id, which are not in it"""
  ids: list[int]
  """all ids drawn, the last of which may have ended the text"""
  logprobs: list[float]
  """of each id under the model, in nats"""
  ended: Literal['id', 'text', 'length']
  """by a stop id, a stop string, or the most tokens allowed"""


class Generator:
  """Continues prompts with text.

    generator = Generator(trained.model, trained.mesh, tokenizer)
    weights = generator.prepare(trained.parameters)
    generator(weights, [generator.prompt('Once upon a time')], max_tokens=50)[0].text

  Args:
    model: of the parameters.
    mesh: where the parameters lie.
    tokenizer: of the prompts and of the text; its end of text ends a continuation.
    zero_stage: at which `prepare` lays the parameters out; see `Decoder`.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, tokenizer: Tokenizer, zero_stage: int = 0):
    self.tokenizer = tokenizer
    self._decoder = Decoder(model, mesh, never_drawn(tokenizer, model.config), zero_stage)

  def prepare(self, parameters: Parameters) -> Parameters:
    """Parameters as decoding reads them; worth keeping for several calls."""
    return self._decoder.prepare(parameters)

  def prompt(self, prompt: Prompt, source: str = '--prompt') -> list[int]:
    """Ids of a conversation, or of a text that begins a document; where there would be none, the tokenizer's bos.

    Raises:
      UserError: the tokenizer cannot encode the text, which the error calls `source`, or has no chat template for the messages.
    """
    if not isinstance(prompt, str):
      return self.tokenizer.chat(prompt).tolist()
    return [*self.tokenizer.start_ids, *self.tokenizer.encode(prompt, source).tolist()] or [self.tokenizer.bos_id]

  def __call__(self, parameters: Parameters, prompts: Sequence[Sequence[int]], **settings) -> list[Continuation]:
    """The continuation of each prompt; the same settings as `stream`."""
    stream = self.stream(parameters, prompts, **settings)
    while True:
      try:
        next(stream)
      except StopIteration as done:
        return done.value

  def stream(self, parameters: Parameters, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling = Sampling(),
             seeds: Sequence[int] | None = None, stop: Sequence[str] = (),
             stop_ids: Sequence[int] | None = None) -> Coroutine[tuple[int, str], None, list[Continuation]]:
    """Yields (row, piece of text) as text comes, and returns all continuations.

    Args:
      parameters: that `prepare` made.
      prompts: ids of each row; see `prompt`.
      max_tokens: tokens to add at the most, 1 or more.
      sampling: how tokens are drawn.
      seeds: of each row's draws; default: 0, 1, 2 and so on.
      stop: strings that end a text.
      stop_ids: ids that end it; default: the tokenizer's ends of a text and of a turn.
    """
    ends = set(self.tokenizer.stop_ids if stop_ids is None else stop_ids)
    continues = [any(self.tokenizer.pieces[i] for i in prompt) for prompt in prompts]
    rows = [_Row(TextStream(self.tokenizer, one), tuple(stop), ends) for one in continues]
    steps = self._decoder(parameters, prompts, sampling, range(len(rows)) if seeds is None else seeds, max_tokens)
    for ids, logprobs in steps:
      for index, row in enumerate(rows):
        if row.ended is None and (piece := row.push(int(ids[index]), float(logprobs[index]))):
          yield index, piece
      if all(row.ended for row in rows):
        break
    for index, row in enumerate(rows):
      if row.ended is None and (piece := row.finish()):
        yield index, piece
    return [Continuation(row.text, row.ids, row.logprobs, row.ended or 'length') for row in rows]


class _Row:
  """The text of one row. What may turn out to begin a stop string is held back."""

  def __init__(self, stream: TextStream, stop: tuple[str, ...], ends: set[int]):
    self._stream, self._stop, self._ends = stream, stop, ends
    self._held = ''
    self.text = ''
    self.ids: list[int] = []
    self.logprobs: list[float] = []
    self.ended: Literal['id', 'text', 'length'] | None = None

  def push(self, token: int, logprob: float) -> str:
    """Takes the next token; returns the text that is certain now."""
    self.ids.append(token)
    self.logprobs.append(logprob)
    if token in self._ends:
      piece = self.finish()  # may end by a stop string itself
      self.ended = self.ended or 'id'
      return piece
    return self._certain(self._stream.push([token]))

  def finish(self) -> str:
    """The rest of the text."""
    piece = self._certain(self._stream.finish())
    rest, self._held = self._held, ''
    self.text += rest
    return piece + rest

  def _certain(self, new: str) -> str:
    waiting = self._held + new
    found = min((at for at in (waiting.find(one) for one in self._stop if one) if at >= 0), default=-1)
    if found >= 0:
      self.ended, self._held = 'text', ''
      waiting = waiting[:found]
    else:
      kept = max((n for one in self._stop for n in range(1, len(one)) if waiting.endswith(one[:n])), default=0)
      waiting, self._held = waiting[:len(waiting) - kept], waiting[len(waiting) - kept:]
    self.text += waiting
    return waiting
