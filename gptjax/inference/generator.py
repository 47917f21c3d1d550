"""Text generation: prompts, stop conditions, and text that is streamed as it is generated."""

import dataclasses
import json
from collections.abc import Generator as Coroutine
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from gptjax.config import UserError
from gptjax.data import TextStream, Tokenizer, is_json_lines
from gptjax.inference.decoding import Decoder
from gptjax.inference.sampling import Sampling, suppressed_ids
from gptjax.model import AbstractModel, Parameters

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a conversation: {'role': ..., 'content': ...} each."""


@dataclasses.dataclass
class Continuation:
  """The continuation of a prompt."""

  text: str = ''
  """up to a stop string or a stop id, which it excludes"""
  ids: list[int] = dataclasses.field(default_factory=list)
  """all generated ids, including one that ended the text"""
  logprobs: list[float] = dataclasses.field(default_factory=list)
  """log-probability of each id under the model, in nats"""
  ended: Literal['id', 'text', 'length'] = 'length'
  """stop reason: a stop id, a stop string, or the maximum number of tokens"""


class Generator:
  """Continues prompts with text.

    generator = Generator(trained.model, trained.mesh, tokenizer)
    weights = generator.prepare(trained.parameters)
    generator(weights, [generator.prompt('Once upon a time')], max_tokens=50)[0].text

  Args:
    model, mesh: of the parameters.
    tokenizer: of the prompts and of the text; its end-of-text ids end a continuation.
    zero_stage: how `prepare` shards the parameters; see `Decoder`.

  Raises:
    UserError: a model that classifies texts.
  """

  def __init__(self, model: AbstractModel, mesh: Mesh, tokenizer: Tokenizer, zero_stage: int = 0):
    if model.config.classes:
      raise UserError('model.classes', model.config.classes, '0 to generate text: this model classifies texts, with gptjax.classify')
    self.tokenizer = tokenizer
    self._vocab_size = model.config.vocab_size
    self._decoder = Decoder(model, mesh, suppressed_ids(tokenizer, model.config), zero_stage)

  def prepare(self, parameters: Parameters) -> Parameters:
    """Parameters in the layout that decoding needs; keep them for several calls."""
    return self._decoder.prepare(parameters)

  def prompt(self, prompt: Prompt, source: str = '--prompt') -> list[int]:
    """Ids of a conversation, or of a text at the beginning of a document; the tokenizer's bos if there would be none. Raises a UserError
    for a text, named `source`, that the tokenizer cannot encode, and for a conversation if it has no chat template."""
    if not isinstance(prompt, str):
      return self.tokenizer.chat(prompt).tolist()
    return [*self.tokenizer.start_ids, *self.tokenizer.encode(prompt, source).tolist()] or [self.tokenizer.bos_id]

  def ends(self, stop_ids: Sequence[int] | None) -> set[int]:
    """Ids that end a text: the tokenizer's by default. Raises a UserError for one that the tokenizer or the model does not have."""
    count = min(self.tokenizer.vocab_size, self._vocab_size)
    for one in stop_ids or ():
      if not 0 <= one < count:
        raise UserError('--stop_ids', one, f'ids of the model, 0 to {count - 1:,}')
    return set(self.tokenizer.stop_ids if stop_ids is None else stop_ids)

  def __call__(self, parameters: Parameters, prompts: Sequence[Sequence[int]], **settings) -> list[Continuation]:
    """The continuation of each prompt, with the settings of `stream`."""
    stream = self.stream(parameters, prompts, **settings)
    while True:
      try:
        next(stream)
      except StopIteration as done:
        return done.value

  def stream(self, parameters: Parameters, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampling: Sampling = Sampling(),
             seeds: Sequence[int] | None = None, stop: Sequence[str] = (),
             stop_ids: Sequence[int] | None = None) -> Coroutine[tuple[int, str], None, list[Continuation]]:
    """Yields (row, piece of text) as the text is generated, and returns all continuations.

    Args:
      parameters: from `prepare`.
      prompts: ids of each row; see `prompt`.
      max_tokens: maximum number of tokens to generate, at least 1.
      sampling: the distribution to sample from.
      seeds: random seed of each row; default: 0, 1, 2 and so on.
      stop: strings that end a text.
      stop_ids: ids that end a text; default: the tokenizer's end-of-text and end-of-turn ids.

    Raises a UserError for a stop id that the model cannot generate.
    """
    ends = self.ends(stop_ids)
    continues = [any(self.tokenizer.pieces[i] for i in prompt) for prompt in prompts]
    rows = [Text(TextStream(self.tokenizer, one), tuple(stop), ends) for one in continues]
    steps = self._decoder(parameters, prompts, sampling, range(len(rows)) if seeds is None else seeds, max_tokens)
    for ids, logprobs in steps:
      for index, row in enumerate(rows):
        if row.ended == 'length' and (piece := row.push(int(ids[index]), float(logprobs[index]))):
          yield index, piece
      if all(row.ended != 'length' for row in rows):
        break
    for index, row in enumerate(rows):
      if row.ended == 'length' and (piece := row.finish()):
        yield index, piece
    return [*rows]


class Text(Continuation):
  """A continuation that grows. A suffix that could be the start of a stop string is held back."""

  def __init__(self, stream: TextStream, stop: tuple[str, ...], ends: set[int]):
    super().__init__()
    self._stream, self._stop, self._ends, self._held = stream, stop, ends, ''

  def push(self, token: int, logprob: float) -> str:
    """Adds the next token; returns the text that became final."""
    self.ids.append(token)
    self.logprobs.append(logprob)
    if token not in self._ends:
      return self._final(self._stream.push([token]))
    piece = self.finish()  # the rest may contain a stop string
    if self.ended == 'length':
      self.ended = 'id'
    return piece

  def finish(self) -> str:
    """Returns the rest of the text."""
    piece = self._final(self._stream.finish()) + self._held
    self.text += self._held
    self._held = ''
    return piece

  def _final(self, new: str) -> str:
    text = self._held + new
    found = min((at for at in (text.find(one) for one in self._stop if one) if at >= 0), default=-1)
    if found >= 0:
      self.ended, end, self._held = 'text', found, ''
    else:
      end = len(text) - max((n for one in self._stop for n in range(1, len(one)) if text.endswith(one[:n])), default=0)
      self._held = text[end:]
    self.text += text[:end]
    return text[:end]


def read_prompts(path: Path) -> list[tuple[str, Prompt]]:
  """Returns (FILE:LINE, for errors; prompt) for each non-empty line of a file: a text, or in JSON lines an object with a text "prompt" or a
  conversation "messages". A byte order mark at the start of a line is dropped. Raises a UserError for a file that is empty or
  cannot be read, and for any other line."""
  try:
    lines = path.read_text(encoding='utf-8').split('\n')  # not splitlines(), which also splits at other Unicode line breaks
  except (OSError, UnicodeDecodeError) as error:
    raise UserError('--prompts', str(path), f'a file of UTF-8 text ({getattr(error, "strerror", None) or error})') from None
  named = [(f'{path}:{number}', text) for number, line in enumerate(lines, 1) if (text := line.removeprefix('\ufeff'))]
  if not named:
    raise UserError('--prompts', str(path), 'a file with at least one prompt')
  return [(source, _parsed(source, line) if is_json_lines(path.name) else line) for source, line in named]


def _parsed(source: str, line: str) -> Prompt:
  try:
    given = json.loads(line)
    prompt = given['messages'] if 'messages' in given else given['prompt']
  except (ValueError, KeyError, TypeError):
    prompt = None
  if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt and all(isinstance(one, dict) for one in prompt)):
    raise UserError(source, line[:80], 'a JSON object with a text "prompt" or a list "messages"')
  return prompt
