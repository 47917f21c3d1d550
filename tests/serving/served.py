"""A server in this process, as tests ask it."""

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request

import jax
import numpy as np

from gptjax.compilations import CompileCounter
from gptjax.serving.scheduler import Scheduler

CONTEXT = 96


class Server:
  """What tests know of the server."""

  def __init__(self, generator, weights, engine, mesh, waiting=40, key=''):
    import uvicorn

    from gptjax.serving.api import Api
    self.generator, self.weights, self.mesh, self.tokenizer = generator, weights, mesh, generator.tokenizer
    self.scheduler = Scheduler(engine, generator.tokenizer, waiting)
    self._compiled = CompileCounter()
    self.api = Api(self.scheduler, generator, self._compiled, 'tiny', CONTEXT, 1, key)
    listener = socket.create_server(('127.0.0.1', 0))
    self.url = f'http://127.0.0.1:{listener.getsockname()[1]}'
    self._server = uvicorn.Server(uvicorn.Config(self.api.app(), log_level='critical'))
    self._threads = [threading.Thread(target=self._server.run, kwargs={'sockets': [listener]}), threading.Thread(target=self._work)]
    for thread in self._threads:
      thread.start()

  def _work(self):
    with jax.set_mesh(self.mesh):
      self.api.ready.set()
      with contextlib.suppress(RuntimeError):  # its requests have been told
        self.scheduler.run()

  def close(self):
    self.scheduler.stop()
    self._server.should_exit = True
    for thread in self._threads:
      thread.join()
    self._compiled.close()

  def open(self, path, body=None, **headers):
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=120)

  def ask(self, path, body=None, **headers):
    """The status and the object of an answer."""
    try:
      with self.open(path, body, **headers) as answer:
        return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
      return error.code, json.load(error)

  def text(self, **body):
    """The first choice of a completion."""
    status, found = self.ask('/v1/completions', body)
    assert status == 200, found
    return found['choices'][0]

  def events(self, path, body):
    """The chunks of a stream, and what ends it."""
    with self.open(path, body | {'stream': True}) as answer:
      parts = answer.read().decode().split('\n\n')
    assert parts.pop() == '' and all(part.startswith('data: ') for part in parts)
    return [json.loads(part[6:]) for part in parts[:-1]], parts[-1]


def drawn(model):
  """Random parameters of a model, on the mesh in force."""
  rng = np.random.default_rng(0)
  values = {name: 0.3 * rng.standard_normal(one.shape, np.float32) for name, one in model.shapes.items()}
  return jax.device_put(values, model.shardings(0, jax.sharding.get_mesh()))
