"""What clients of OpenAI's interface send, read strictly, and the objects that they expect back.

Reference: the OpenAI API, completions and chat completions. A field that would change the answer and is not supported is refused.
"""

import dataclasses
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config import UserError
from gptjax.data import TextStream, Tokenizer
from gptjax.inference import Generator
from gptjax.serving.engine import ALTERNATIVES, BIASES, Settings
from gptjax.serving.scheduler import Piece, Token

_IGNORED = {'user', 'metadata', 'store', 'service_tier', 'safety_identifier', 'prompt_cache_key', 'model'}
"""Fields that change no answer."""
_MOST = 128
"""texts per request"""
_NUMBERS: dict[str, tuple[type, float, float, float]] = {
  'temperature': (float, 1, 0, 2), 'top_p': (float, 1, 1e-6, 1), 'top_k': (int, 0, -1, math.inf), 'min_p': (float, 0, 0, 1),
  'repetition_penalty': (float, 1, 0.01, 100), 'presence_penalty': (float, 0, -2, 2), 'frequency_penalty': (float, 0, -2, 2),
  'n': (int, 1, 1, _MOST), 'seed': (int, -1, -2**63, 2**63)}
"""Type, default, least and largest value."""
_NEUTRAL: dict[str, tuple[object, ...]] = {
  'best_of': (1,), 'suffix': ('',), 'tools': ([],), 'tool_choice': ('none', 'auto'), 'response_format': ({'type': 'text'},),
  'modalities': (['text'],), 'functions': ([],), 'function_call': ('none', 'auto'), 'parallel_tool_calls': (True, False)}
"""Values of fields that are not supported which ask for nothing."""


class Refused(Exception):
  """A request that is answered by an error, as OpenAI's interface has them."""

  def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None,
               kind: str = 'invalid_request_error'):
    super().__init__(message)
    self.status = status
    self.body = {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}


@dataclasses.dataclass(frozen=True)
class Call:
  """A request for texts."""

  chat: bool
  prompts: list[list[int]]
  given: list[str]
  """texts of the prompts, for `echo`"""
  added: list[int]
  """tokens at the start of each prompt that the client did not send"""
  count: int
  """texts per prompt"""
  max_tokens: int | None
  settings: Settings
  seed: int
  stop: tuple[str, ...]
  stop_ids: frozenset[int]
  bias: dict[int, float]
  alternatives: int | None
  """most likely tokens that are reported; None: no log-probabilities"""
  echo: bool
  stream: bool
  usage: bool
  """whether a stream ends with the usage"""


def read(body: Any, chat: bool, generator: Generator, context: int, models: Sequence[str]) -> Call:
  """Reads the body of a request. Raises Refused."""
  if not isinstance(body, dict):
    raise Refused('the body must be a JSON object')
  fields = {name: value for name, value in body.items() if value is not None}
  _check_names(fields, chat)
  if fields.get('model', models[0]) not in models:
    raise Refused(f'the model {fields["model"]!r} does not exist; there is {", ".join(models)}', 'model', 404, 'model_not_found')
  numbers = {name: _number(fields, name) for name in _NUMBERS}
  prompts, given, added = _conversation(fields, generator) if chat else _prompts(fields, generator)
  stop = fields.get('stop', [])
  stop = [stop] if isinstance(stop, str) else stop
  if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(one, str) and one for one in stop):
    raise Refused('stop must be a text or at most 4 texts, none of them empty', 'stop')
  most = _integer(fields, 'max_completion_tokens' if 'max_completion_tokens' in fields else 'max_tokens', 0 if not chat else 1, None)
  echo = _bool(fields, 'echo')
  for prompt in prompts:
    if len(prompt) > context - (0 if echo and most == 0 else 1):
      raise Refused(f'the prompt has {len(prompt):,} tokens, the context {context:,}, of which one is for the answer',
                    'messages' if chat else 'prompt', code='context_length_exceeded')
    if most is not None and len(prompt) + most > context:
      raise Refused(f'the prompt has {len(prompt):,} tokens and max_tokens is {most:,}, more than the context of {context:,}', 'max_tokens',
                    code='context_length_exceeded')
  if most == 0 and not echo:
    raise Refused('max_tokens must be at least 1 without echo', 'max_tokens')
  ignore = _bool(fields, 'ignore_eos')
  try:
    stop_ids = generator.ends(fields.get('stop_token_ids', ())) if 'stop_token_ids' in fields else set()
  except (UserError, TypeError) as error:
    raise Refused(f'stop_token_ids: {error}', 'stop_token_ids') from None
  options = fields.get('stream_options', {})
  if not isinstance(options, dict) or options.keys() - {'include_usage'}:
    raise Refused('stream_options may have include_usage', 'stream_options')
  seed = secrets.randbits(32) if 'seed' not in fields else int(numbers['seed']) % 2**32
  settings = Settings(**{name: numbers[name] for name in Settings._fields} | {'top_k': max(int(numbers['top_k']), 0)})  # type: ignore[arg-type]
  return Call(chat, prompts, given, added, int(numbers['n']), most if most is not None or chat else 16, settings, seed, tuple(stop),
              frozenset(stop_ids | (set() if ignore else set(generator.tokenizer.stop_ids))), _bias(fields, generator.tokenizer.vocab_size),
              _alternatives(fields, chat), echo, _bool(fields, 'stream'), _bool(options, 'include_usage'))


def _check_names(fields: Mapping[str, Any], chat: bool) -> None:
  known = {*_NUMBERS, *_IGNORED, 'max_tokens', 'stop', 'stop_token_ids', 'ignore_eos', 'logit_bias', 'logprobs', 'stream', 'stream_options',
           *(('messages', 'max_completion_tokens', 'top_logprobs') if chat else ('prompt', 'echo'))}
  for name, value in fields.items():
    if name in _NEUTRAL:
      if value not in _NEUTRAL[name]:
        raise Refused(f'{name} is not supported', name, code='unsupported_parameter')
    elif name not in known:
      raise Refused(f'unknown field {name}', name, code='unknown_parameter')


def _number(fields: Mapping[str, Any], name: str) -> float:
  kind, default, low, high = _NUMBERS[name]
  value = fields.get(name, default)
  if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int) or not low <= value <= high:
    wanted = 'an integer' if kind is int else 'a number'
    raise Refused(f'{name} must be {wanted} from {low:g} to {high:g}, not {value!r:.100}', name)
  return value


def _integer(fields: Mapping[str, Any], name: str, low: int, default: int | None) -> int | None:
  value = fields.get(name, default)
  if value is not default and (isinstance(value, bool) or not isinstance(value, int) or value < low):
    raise Refused(f'{name} must be an integer of at least {low}, not {value!r:.100}', name)
  return value


def _bool(fields: Mapping[str, Any], name: str) -> bool:
  if not isinstance(value := fields.get(name, False), bool):
    raise Refused(f'{name} must be true or false, not {value!r:.100}', name)
  return value


def _alternatives(fields: Mapping[str, Any], chat: bool) -> int | None:
  if not chat:
    value = _integer(fields, 'logprobs', 0, None)
  elif _bool(fields, 'logprobs'):
    value = _integer(fields, 'top_logprobs', 0, 0)
  elif 'top_logprobs' in fields:
    raise Refused('top_logprobs needs logprobs', 'top_logprobs')
  else:
    return None
  if value is not None and value > ALTERNATIVES:
    raise Refused(f'at most {ALTERNATIVES} alternatives are reported, not {value}', 'top_logprobs' if chat else 'logprobs')
  return value


def _bias(fields: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
  given = fields.get('logit_bias', {})
  try:
    found = {int(name): float(value) for name, value in given.items()}
  except (AttributeError, TypeError, ValueError):
    raise Refused('logit_bias must be an object of numbers by token id', 'logit_bias') from None
  if len(found) > BIASES or not all(0 <= one < vocab_size and -100 <= value <= 100 for one, value in found.items()):
    raise Refused(f'logit_bias may have {BIASES} ids, from 0 to {vocab_size - 1}, with values from -100 to 100', 'logit_bias')
  return found


def _prompts(fields: Mapping[str, Any], generator: Generator) -> tuple[list[list[int]], list[str], list[int]]:
  given = fields.get('prompt', '')
  several = given if isinstance(given, list) and given and isinstance(given[0], (str, list)) else [given]
  if len(several) > _MOST:
    raise Refused(f'at most {_MOST} prompts', 'prompt')
  tokenizer, prompts, texts, added = generator.tokenizer, [], [], []
  for one in several:
    if isinstance(one, str):
      try:
        ids = generator.prompt(one, 'prompt')
      except UserError as error:
        raise Refused(str(error), 'prompt') from None
      text, start = one, len(ids) - len(tokenizer.encode(one))
    elif isinstance(one, list) and one and all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in one):
      ids, text, start = one, tokenizer.decode(one), 0
    else:
      raise Refused(f'prompt must be a text, a list of texts, or one or more lists of ids from 0 to {tokenizer.vocab_size - 1}', 'prompt')
    prompts.append(ids)
    texts.append(text)
    added.append(start)
  return prompts, texts, added


def _conversation(fields: Mapping[str, Any], generator: Generator) -> tuple[list[list[int]], list[str], list[int]]:
  messages = fields.get('messages')
  if not isinstance(messages, list) or not messages:
    raise Refused('messages must be a list of one or more messages', 'messages')
  found = []
  for index, message in enumerate(messages):
    content = message.get('content') if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get('type') == 'text' and isinstance(part.get('text'), str)
                                         for part in content):
      content = ''.join(part['text'] for part in content)
    if not isinstance(content, str) or not isinstance(message.get('role'), str):
      raise Refused(f'messages[{index}] must have a role and a content, a text or parts of the type text', f'messages[{index}]')
    found.append({'role': message['role'], 'content': content})
  try:
    return [generator.prompt(found)], [''], [0]
  except UserError as error:
    raise Refused(str(error), 'messages') from None


class Answer:
  """The objects that answer a call, built as its texts grow."""

  def __init__(self, call: Call, model: str, tokenizer: Tokenizer):
    self._call, self._tokenizer = call, tokenizer
    kind = 'chat.completion' if call.chat else 'text_completion'
    self._whole: dict[str, Any] = {
      'id': f'{"chatcmpl" if call.chat else "cmpl"}-{secrets.token_hex(12)}', 'object': kind, 'created': int(time.time()), 'model': model}
    texts = len(call.prompts) * call.count
    self._texts, self._tokens, self._ended = [''] * texts, [list[Token]() for _ in range(texts)], [''] * texts
    self._begun, self._drawn = [False] * texts, 0
    self._offsets = [TextStream(tokenizer) for _ in range(texts)]
    self._characters = [0] * texts
    self._skipped = [call.added[index // call.count] for index in range(texts)]

  def add(self, index: int, piece: Piece, prompt: bool) -> list[dict[str, Any]]:
    """Adds news of a text, of its prompt or of its continuation; returns the chunks of a stream."""
    call = self._call
    tokens = piece.tokens
    if prompt:
      skipped = min(self._skipped[index], len(tokens))
      self._skipped[index] -= skipped
      tokens = tokens[skipped:]
    else:
      self._drawn += len(tokens)
    text = piece.text
    if call.echo and not self._begun[index]:
      text = call.given[index // call.count] + text
    logprobs = self._logprobs(index, tokens) if call.alternatives is not None else None
    self._texts[index] += text
    self._tokens[index] += tokens
    self._ended[index] = piece.ended
    first, self._begun[index] = not self._begun[index], True
    if not call.stream:
      return []
    if not text and not tokens and not piece.ended:
      return []
    if not call.chat:
      if not text and not piece.ended and logprobs is None:
        return []  # the token is a part of a character, or of what may be a stop string
      return [self._chunk(index, {'text': text, 'logprobs': logprobs}, piece.ended or None)]
    delta = ({'role': 'assistant'} if first else {}) | ({'content': text} if text or first else {})
    chunks = [self._chunk(index, {'delta': delta, 'logprobs': logprobs}, None)] if delta or logprobs else []
    return chunks + ([self._chunk(index, {'delta': {}, 'logprobs': None}, piece.ended)] if piece.ended else [])

  def _chunk(self, index: int, choice: dict[str, Any], ended: str | None) -> dict[str, Any]:
    usage = {'usage': None} if self._call.usage else {}
    kind = {'object': 'chat.completion.chunk'} if self._call.chat else {}
    return {**self._whole, **kind, 'choices': [{'index': index, **choice, 'finish_reason': ended}], **usage}

  def usage_chunk(self) -> dict[str, Any]:
    """The last chunk of a stream that was asked for the usage."""
    return {**self._whole, **({'object': 'chat.completion.chunk'} if self._call.chat else {}), 'choices': [], 'usage': self._usage()}

  def whole(self) -> dict[str, Any]:
    """The answer that is not streamed."""
    choices: list[dict[str, Any]] = []
    for index, text in enumerate(self._texts):
      self._offsets[index], self._characters[index] = TextStream(self._tokenizer), 0
      logprobs = self._logprobs(index, tuple(self._tokens[index])) if self._call.alternatives is not None else None
      content = {'message': {'role': 'assistant', 'content': text, 'refusal': None}} if self._call.chat else {'text': text}
      choices.append({'index': index, **content, 'logprobs': logprobs, 'finish_reason': self._ended[index]})
    return {**self._whole, 'choices': choices, 'usage': self._usage()}

  def _usage(self) -> dict[str, int]:
    read = sum(map(len, self._call.prompts))
    return {'prompt_tokens': read, 'completion_tokens': self._drawn, 'total_tokens': read + self._drawn}

  def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
    most = self._call.alternatives or 0
    if self._call.chat:
      return {'content': [{**self._named(token.id, token.logprob), 'top_logprobs': [self._named(*one) for one in token.best(most)]}
                          for token in tokens]}
    offsets = []
    for token in tokens:
      offsets.append(self._characters[index])
      self._characters[index] += len(self._offsets[index].push([token.id]))
    best = [None if token.logprob is None or not most else {self._name(one): value for one, value in token.best(most)} for token in tokens]
    return {'tokens': [self._name(token.id) for token in tokens], 'token_logprobs': [token.logprob for token in tokens],
            'top_logprobs': best, 'text_offset': offsets}

  def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
    return {'token': self._name(token), 'logprob': logprob, 'bytes': list(self._tokenizer.pieces[token])}

  def _name(self, token: int) -> str:
    """The text of a token, its bytes if it is a part of a character, or its id if it has no text."""
    piece = self._tokenizer.pieces[token] if token < self._tokenizer.vocab_size else b''
    try:
      return piece.decode() or f'<|{token}|>'
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in piece)
