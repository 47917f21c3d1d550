"""Serves a trained model to many clients, by OpenAI's interface: python -m gptjax.serve --workdir=DIR

  curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def ", "max_tokens": 40}'

A page to chat on is at http://127.0.0.1:8000/. Clients must send the key that the environment variable GPTJAX_API_KEY has, if there is one.
"""

import gptjax.program  # noqa: F401  (first: it handles signals)
import os
import socket
import sys
import threading
import time

from absl import flags

from gptjax import config as configs
from gptjax import distributed
from gptjax.config import UserError
from gptjax.files import expanded
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run, trained or imported', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to use: latest, best (lowest validation loss), or a step')
_MODEL_AXIS = flags.DEFINE_integer(
  'model_axis', 0, 'tensor parallel devices; 0: as in training if the devices allow it', lower_bound=0)
_HOST = flags.DEFINE_string('host', '127.0.0.1', 'address to listen on; 0.0.0.0: all of this machine, which others can reach')
_PORT = flags.DEFINE_integer('port', 8000, 'port to listen on; 0: any that is free', lower_bound=0, upper_bound=65535)
_SLOTS = flags.DEFINE_integer('slots', 8, 'texts that are generated at a time', lower_bound=1)
_WAITING = flags.DEFINE_integer('waiting', 256, 'texts that may wait for a slot; more are refused with status 429', lower_bound=0)
_NAME = flags.DEFINE_string('name', '', "the model's name for clients; default: that of the folder")
KEY = 'GPTJAX_API_KEY'


def main(_: object) -> None:
  try:
    import uvicorn
  except ImportError:
    raise UserError('gptjax.serve', 'not installed', 'uvicorn and starlette: pip install -r requirements-serve.txt') from None
  start()
  import jax

  from gptjax import checkpoint, data, inference
  from gptjax.compilations import CompileCounter
  from gptjax.serving.api import Api
  from gptjax.serving.engine import Engine
  from gptjax.serving.scheduler import Scheduler
  if (count := distributed.process_group().count) > 1:
    raise UserError('gptjax.serve', f'{count} processes', 'a single process, with all devices')
  workdir = expanded(_WORKDIR.value, '--workdir')
  listener = _listener()
  trained = checkpoint.load_trained(workdir, _STEP.value, _MODEL_AXIS.value)
  tokenizer = data.open_held_out(workdir / 'data').tokenizer
  print(trained.description, file=sys.stderr)
  with jax.set_mesh(trained.mesh):
    generator = inference.Generator(trained.model, trained.mesh, tokenizer)
    engine = Engine(trained.model, trained.mesh, generator.prepare(trained.parameters),
                    inference.suppressed_ids(tokenizer, trained.model.config), _SLOTS.value)
  context, created = trained.model.context, int(time.time())
  del trained  # frees the restored parameters
  scheduler = Scheduler(engine, tokenizer, _WAITING.value)
  api = Api(scheduler, generator, CompileCounter(), _NAME.value or workdir.name, context, created, os.environ.get(KEY, ''))
  server = uvicorn.Server(uvicorn.Config(api.app(), log_level='warning', timeout_graceful_shutdown=5))
  failures: list[BaseException] = []

  def serve() -> None:
    try:
      with jax.set_mesh(engine.mesh):
        engine.compile(lambda text: print(text, file=sys.stderr, flush=True))
        host, port = listener.getsockname()[:2]
        api.ready.set()  # before it is told: clients wait for the line
        print(f'ready: http://{host}:{port}', flush=True)
        scheduler.run()
    except BaseException as error:
      failures.append(error)
      server.should_exit = True

  worker = threading.Thread(target=serve, name='scheduler', daemon=True)
  worker.start()
  try:
    server.run(sockets=[listener])
  finally:
    scheduler.stop()
    worker.join(timeout=60 if api.ready.is_set() else 0)
  if failures:
    raise failures[0]


def _listener() -> socket.socket:
  """The socket of --host and --port; a UserError if it cannot be had."""
  family = socket.AF_INET6 if ':' in _HOST.value else socket.AF_INET
  listener = socket.socket(family)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((_HOST.value, _PORT.value))
  except socket.gaierror as error:
    raise UserError('--host', _HOST.value, f'an address of this machine ({error.strerror})') from None
  except OSError as error:
    field, address = '--port' if _PORT.value else '--host', f'{_HOST.value}:{_PORT.value}'
    raise UserError(field, address, f'an address that is free ({error.strerror})') from None
  return listener


def script() -> None:
  """The command gptjax-serve."""
  configs.run(main, needs_config=False)


if __name__ == '__main__':
  script()
