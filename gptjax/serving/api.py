"""The HTTP side of a server: OpenAI's routes over a scheduler, health and metrics, and a page to chat on."""

import asyncio
import hmac
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gptjax.compilations import CompileCounter
from gptjax.inference import Generator
from gptjax.serving.protocol import Answer, Call, Refused, read
from gptjax.serving.scheduler import Full, Piece, Request, Scheduler

_LARGEST = 2**22
"""bytes of a request"""
_RETRY = '1'
"""seconds after which a client may try again"""


class Api:
  """The application.

  Args:
    compiled: counts programs, for the metrics.
    model: its name for clients.
    key: that clients must send; '': none.
    context: tokens of a prompt and its continuation.
  """

  def __init__(self, scheduler: Scheduler, generator: Generator, compiled: CompileCounter, model: str, context: int, created: int,
               key: str = ''):
    self._compiled = compiled
    self._scheduler, self._generator, self._model, self._context, self._key = scheduler, generator, model, context, key
    self._card = {'id': model, 'object': 'model', 'created': created, 'owned_by': 'gptjax', 'max_model_len': context}
    self.ready = threading.Event()
    """set when every program is compiled"""

  def app(self) -> Starlette:
    """The ASGI application."""
    return Starlette(routes=[
      Route('/', lambda request: FileResponse(Path(__file__).with_name('page.html'))),
      Route('/health', self._health),
      Route('/metrics', self._guarded(self._metrics)),
      Route('/v1/models', self._guarded(self._models)),
      Route('/v1/models/{name:path}', self._guarded(self._models)),
      Route('/v1/completions', self._guarded(self._texts), methods=['POST']),
      Route('/v1/chat/completions', self._guarded(self._texts), methods=['POST'])],
      exception_handlers={404: _missing, 405: _missing})

  def _guarded(self, route: Callable) -> Callable:
    async def run(request: HttpRequest) -> Response:
      sent = request.headers.get('authorization', '').removeprefix('Bearer ')
      if self._key and not hmac.compare_digest(sent.encode(), self._key.encode()):
        return _error(Refused('the API key is missing or wrong', status=401, code='invalid_api_key'))
      try:
        return await route(request)
      except Refused as refused:
        return _error(refused)
    return run

  async def _health(self, request: HttpRequest) -> Response:
    state = self._scheduler.error or ('ready' if self.ready.is_set() else 'compiling')
    return JSONResponse({'status': state}, 200 if state == 'ready' else 503)

  async def _models(self, request: HttpRequest) -> Response:
    name = request.path_params.get('name')
    if name not in (None, self._model):
      raise Refused(f'the model {name!r} does not exist; there is {self._model}', 'model', 404, 'model_not_found')
    return JSONResponse(self._card if name else {'object': 'list', 'data': [self._card]})

  async def _metrics(self, request: HttpRequest) -> Response:
    scheduler = self._scheduler
    counts = dict(scheduler.counts)
    lines = ['# TYPE gptjax_requests_running gauge', f'gptjax_requests_running {scheduler.running}',
             '# TYPE gptjax_requests_waiting gauge', f'gptjax_requests_waiting {scheduler.waiting}',
             '# TYPE gptjax_requests_total counter']
    lines += [f'gptjax_requests_total{{end="{end}"}} {counts.get(end, 0)}' for end in ('stop', 'length', 'cancelled', 'refused')]
    lines += ['# TYPE gptjax_tokens_total counter']
    lines += [f'gptjax_tokens_total{{kind="{kind}"}} {counts.get(kind, 0)}' for kind in ('read', 'reused', 'drawn')]
    lines += ['# TYPE gptjax_programs_compiled_total counter', f'gptjax_programs_compiled_total {self._compiled.count}']
    return PlainTextResponse('\n'.join(lines) + '\n', media_type='text/plain; version=0.0.4')

  async def _texts(self, request: HttpRequest) -> Response:
    chat = request.url.path.endswith('/chat/completions')
    body = await _body(request)
    if self._scheduler.error or not self.ready.is_set():
      raise Refused(self._scheduler.error or 'the programs are being compiled', status=503, code='not_ready', kind='server_error')
    call = await asyncio.to_thread(read, body, chat, self._generator, self._context, [self._model])
    answer, pieces = Answer(call, self._model, self._generator.tokenizer), _Pieces(call, self._scheduler, self._context)
    if call.stream:
      return StreamingResponse(_events(call, answer, pieces), media_type='text/event-stream', headers={'Cache-Control': 'no-cache'})
    gone = asyncio.ensure_future(_leaves(request))
    try:
      async for index, piece, prompt in pieces.until(gone):
        answer.add(index, piece, prompt)
    finally:
      gone.cancel()
    return Response(status_code=499) if pieces.left else JSONResponse(answer.whole())


class _Pieces:
  """The news of the texts of a call, in the event loop that makes it. Raises Refused if they cannot be taken."""

  def __init__(self, call: Call, scheduler: Scheduler, context: int):
    loop, self._queue, self.left = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece] | None](), False

    def send(index: int) -> Callable[[Piece], None]:
      def put(piece: Piece) -> None:
        if not loop.is_closed():
          loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))
      return put

    scored = call.echo and call.alternatives is not None
    self._requests = [
      Request(prompt, context - len(prompt) if call.max_tokens is None else call.max_tokens, call.settings, (call.seed + copy) % 2**32,
              call.stop, call.stop_ids, call.bias, scored, bool(call.alternatives), send(number * call.count + copy))
      for number, prompt in enumerate(call.prompts) for copy in range(call.count)]
    self._expected = [len(request.prompt) if scored else 0 for request in self._requests]
    try:
      scheduler.submit(self._requests)
    except Full:
      scheduler.counts['refused'] += len(self._requests)
      raise Refused('too many requests are waiting', status=429, code='queue_full', kind='rate_limit_error') from None

  async def until(self, gone: asyncio.Future | None = None) -> AsyncIterator[tuple[int, Piece, bool]]:
    """The index of a text, its news, and whether they are of its prompt, until all texts have ended, or `gone` is done."""
    running = len(self._requests)
    if gone:
      gone.add_done_callback(lambda _: self._queue.put_nowait(None))
    try:
      while running:
        if (news := await self._queue.get()) is None:
          self.left = True
          return
        index, piece = news
        if piece.ended == 'error':
          raise Refused(piece.text, status=500, code='engine', kind='server_error')
        running -= bool(piece.ended)
        prompt = self._expected[index] > 0
        self._expected[index] -= len(piece.tokens) if prompt else 0
        yield index, piece, prompt
    finally:
      for request in self._requests:
        request.cancelled = True  # those that have ended do not mind


async def _events(call: Call, answer: Answer, pieces: _Pieces) -> AsyncIterator[str]:
  event = lambda value: f'data: {json.dumps(value)}\n\n'
  try:
    async for index, piece, prompt in pieces.until():
      for chunk in answer.add(index, piece, prompt):
        yield event(chunk)
  except Refused as refused:
    yield event(refused.body)
    return
  if call.usage:
    yield event(answer.usage_chunk())
  yield 'data: [DONE]\n\n'


async def _leaves(request: HttpRequest) -> None:
  while (await request.receive())['type'] != 'http.disconnect':
    pass


async def _body(request: HttpRequest) -> Any:
  data = bytearray()
  async for part in request.stream():
    data += part
    if len(data) > _LARGEST:
      raise Refused(f'a request may have {_LARGEST:,} bytes', status=413, code='too_large')
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as error:
    raise Refused(f'the body is not JSON: {error}') from None


def _error(refused: Refused) -> Response:
  headers = {'Retry-After': _RETRY} if refused.status in (429, 503) else {}
  return JSONResponse(refused.body, refused.status, headers)


async def _missing(request: HttpRequest, error: Any) -> Response:
  there = 'GET /v1/models, POST /v1/completions, POST /v1/chat/completions, GET /health, GET /metrics'
  message = f'{request.method} {request.url.path} does not exist; there is {there}'
  return _error(Refused(message, status=error.status_code, code='not_found'))
