"""A server as a process, and clients of its stream that measure it; definitions as in vLLM's benchmark of servers."""

import asyncio
import contextlib
import dataclasses
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Served:
  """A server that is ready."""

  port: int
  pid: int
  before: int
  """programs that were compiled until it was ready"""

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.port}'

  @property
  def compiled(self) -> int:
    """Programs that were compiled, or read from the cache of programs, since it is ready."""
    return int(self.metrics()['gptjax_programs_compiled_total']) - self.before

  @property
  def memory(self) -> int:
    """Bytes of the process in memory."""
    return int(re.search(r'VmRSS:\s+(\d+) kB', Path(f'/proc/{self.pid}/status').read_text())[1]) << 10

  def metrics(self) -> dict[str, float]:
    with urllib.request.urlopen(f'{self.url}/metrics') as answer:
      lines = [line.rsplit(' ', 1) for line in answer.read().decode().splitlines() if not line.startswith('#')]
    return {name: float(value) for name, value in lines}


@contextlib.contextmanager
def serve(workdir: Path, *args: str) -> Iterator[Served]:
  """Serves a run while the body runs."""
  log = workdir.parent / 'server.log'
  with log.open('w') as file:
    server = subprocess.Popen([sys.executable, '-m', 'gptjax.serve', f'--workdir={workdir}', '--port=0', *args], stdout=subprocess.PIPE,
                              stderr=file, text=True)
    try:
      line = server.stdout.readline()
      if not line.startswith('ready'):
        raise RuntimeError(f'no server: {log.read_text()[-2000:]}')
      ready = Served(int(line.rsplit(':', 1)[1]), server.pid, 0)
      assert ready.compiled > 0, 'programs are counted'
      yield dataclasses.replace(ready, before=ready.compiled)
    finally:
      server.terminate()
      server.wait(timeout=60)


@dataclasses.dataclass(frozen=True)
class Timing:
  """Of a request, in seconds."""

  first: float
  """until the first token"""
  latency: float
  tokens: int


async def stream(port: int, body: dict) -> Timing:
  """Asks for a completion; the tokens are those of the usage."""
  begin = time.monotonic()
  reader, writer = await asyncio.open_connection('127.0.0.1', port)
  data = json.dumps({'stream': True, 'stream_options': {'include_usage': True}, 'ignore_eos': True, **body}).encode()
  writer.write(b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n' % len(data) + data)
  first, tokens = 0.0, 0
  async for line in reader:
    if line.startswith(b'data: {'):
      chunk = json.loads(line[6:])
      first = first or time.monotonic() - begin
      tokens = chunk['usage']['completion_tokens'] if chunk['usage'] else tokens
  writer.close()
  return Timing(first, time.monotonic() - begin, tokens)


def load(port: int, bodies: Sequence[dict], clients: int) -> tuple[list[Timing], float]:
  """Requests by clients that each wait for their answers, and the seconds that all took."""
  async def run():
    rest = iter(bodies)
    found: list[Timing] = []

    async def client():
      for body in rest:
        found.append(await stream(port, body))
    begin = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    return found, time.monotonic() - begin
  return asyncio.run(run())


def bodies(count: int, prompt: int, new: int, seed: int = 0) -> list[dict]:
  """Requests for `new` tokens after prompts of random ids."""
  rng = random.Random(seed)
  return [{'prompt': [rng.randrange(1000, 50_000) for _ in range(prompt)], 'max_tokens': new, 'seed': index} for index in range(count)]


async def _nuisance(port: int, index: int) -> None:
  """A client that leaves, or that sends what is no request."""
  rng = random.Random(index)
  try:
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    kind = index % 5
    body = json.dumps({'prompt': 'Once', 'max_tokens': 200, 'ignore_eos': True, 'stream': kind == 0, 'n': rng.randrange(1, 4)}).encode()
    head = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n'
    writer.write({0: head % len(body) + body, 1: head % len(body) + body, 2: head % len(body) + body[:9],
                  3: head % 40 + rng.randbytes(40), 4: rng.randbytes(300)}[kind])
    await writer.drain()
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(reader.read(100), rng.random() * 2)
    writer.close()
  except ConnectionError:
    pass


def disturb(port: int, count: int) -> None:
  """Clients that leave at random moments, in the middle of a stream, of a wait or of their request, or send garbage; 50 at a time."""
  async def run():
    gate = asyncio.Semaphore(50)

    async def one(index):
      async with gate:
        await _nuisance(port, index)
    await asyncio.gather(*(one(index) for index in range(count)))
  asyncio.run(run())
