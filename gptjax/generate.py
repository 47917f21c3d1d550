"""Continues texts with a trained model.

  python -m gptjax.generate --workdir=DIR --prompt='def '
  python -m gptjax.generate --workdir=DIR --prompts=FILE --out=FILE.jsonl
  python -m gptjax.generate --workdir=DIR --chat
"""

import gptjax.program  # noqa: F401  (first: it handles signals)
import json
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from gptjax import config as configs
from gptjax import distributed, signals
from gptjax.config import UserError, unescaped
from gptjax.files import expanded, writable, write_results
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to use: latest, best (lowest validation loss), or a step')
_MODEL_AXIS = flags.DEFINE_integer(
  'model_axis', 0, 'tensor parallel devices; 0: as in training if the devices allow it', lower_bound=0)
_PROMPT = flags.DEFINE_string(
  'prompt', '', r'text to continue; in it, as in --stop and --system, \n is a line end, \t a tab and \\ a backslash')
_PROMPTS = flags.DEFINE_string('prompts', None, 'file of prompts instead of --prompt: one text per line, or (.jsonl) objects with a '
                              'text "prompt" or a conversation "messages", [{"role": "user", "content": ...}]')
_OUT = flags.DEFINE_string('out', None, 'file for JSON lines of prompt, text, ids, logprobs (nats) and ended; default: text on stdout')
_CHAT = flags.DEFINE_bool('chat', False, 'chat with a model whose tokenizer has a chat template: each line is a message, /new starts '
                          'a new conversation, Ctrl-C ends an answer, Ctrl-D the program')
_SYSTEM = flags.DEFINE_string('system', '', 'system message of a conversation')
_SAMPLES = flags.DEFINE_integer('samples', 1, 'continuations of each prompt', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch_size', 8, 'number of rows per batch', lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 200, 'maximum number of tokens to generate; fewer if the document ends', lower_bound=1)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.8, 'divides the logits; 0: greedy decoding')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'sample from this many most likely tokens; 0: from all')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'sample from the most likely tokens that together have this probability; 1: from all')
_MIN_P = flags.DEFINE_float('min_p', 0.0, "sample from tokens with at least this fraction of the highest probability; 0: from all")
_PENALTY = flags.DEFINE_float('repetition_penalty', 1.0, 'divides the logits of tokens that are already in the text; 1: off')
_STOP = flags.DEFINE_multi_string('stop', [], 'text that ends a continuation and is removed from it; may be repeated')
_STOP_IDS = flags.DEFINE_multi_integer('stop_ids', None, "token ids that end a continuation instead of the tokenizer's; may be repeated")
_SEED = flags.DEFINE_integer('seed', 0, 'seed of sampling; each row adds its index', lower_bound=0, upper_bound=2**32 - 1)


def main(_) -> None:
  start()
  import jax

  from gptjax import checkpoint, data, inference

  sampling = inference.Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value, _PENALTY.value)
  _check_flags()
  system = [{'role': 'system', 'content': unescaped(_SYSTEM.value)}] if _SYSTEM.value else []
  prompts: list[tuple[str, Any]] = [('--prompt', unescaped(_PROMPT.value))]
  if _CHAT.value:
    prompts = [('--system', [*system, {'role': 'user', 'content': 'Hello'}])]  # checks that the template supports it
  elif _PROMPTS.value:
    prompts = inference.read_prompts(expanded(_PROMPTS.value))
  workdir = expanded(_WORKDIR.value, '--workdir')
  trained = checkpoint.load_trained(workdir, _STEP.value, _MODEL_AXIS.value)
  tokenizer = data.open_held_out(workdir / 'data').tokenizer
  context = trained.model.context
  with jax.set_mesh(trained.mesh):
    generator = inference.Generator(trained.model, trained.mesh, tokenizer)

    generator.ends(_STOP_IDS.value)

    def read(prompt, source):
      ids = generator.prompt(prompt, source)
      if len(ids) > context and distributed.is_primary():
        print(f'{source}: {len(ids)} tokens, truncated to the last {context}', file=sys.stderr)
      return ids

    # Stop ids are checked and all prompts read, and mistakes in them reported, before anything is printed.
    rows = [row for source, prompt in prompts for row in [(prompt, read(prompt, source))] * _SAMPLES.value]
    if distributed.is_primary():
      print(trained.description, file=sys.stderr)
    weights = generator.prepare(trained.parameters)
    del trained  # frees the restored parameters

    settings: dict[str, Any] = {'max_tokens': _MAX_TOKENS.value, 'sampling': sampling, 'stop_ids': _STOP_IDS.value,
                                'stop': list(map(unescaped, _STOP.value))}
    seeds = lambda first, count=1: [(_SEED.value + first + index) % 2**32 for index in range(count)]
    if _CHAT.value:
      _chat(system, read, lambda ids, turn: generator.stream(weights, [ids], seeds=seeds(turn), **settings))
    elif len(rows) == 1 and not _OUT.value and isinstance(rows[0][0], str):
      print(rows[0][0], end='', flush=True)
      _show(generator.stream(weights, [rows[0][1]], seeds=seeds(0), **settings))
    else:
      _write(rows, lambda some, first: generator(weights, some, seeds=seeds(first, len(some)), **settings))


def _check_flags() -> None:
  if '' in _STOP.value:
    raise UserError('--stop', '', 'a text of one or more characters')
  if _PROMPTS.value and _PROMPT.value:
    raise UserError('--prompt', _PROMPT.value, 'no --prompt together with --prompts')
  if _CHAT.value:
    for flag in (_PROMPT, _PROMPTS, _OUT):
      if flag.value:
        raise UserError(f'--{flag.name}', flag.value, 'none together with --chat, which reads the keyboard')
    if (count := distributed.process_group().count) > 1:
      raise UserError('--chat', f'{count} processes', 'a single process, which has the keyboard')
  elif _SYSTEM.value:
    raise UserError('--system', _SYSTEM.value, 'none without --chat; in --prompts, a first message with the role "system"')
  if _OUT.value:
    writable(_OUT.value, '--out')


def _chat(system: list[dict[str, str]], read: Callable, answer: Callable[[list[int], int], Iterator[tuple[int, str]]]) -> None:
  """Reads messages from the keyboard and prints answers. `read` converts messages to ids, and `answer` the ids of a conversation, which
  begins with `system`, and the number of the turn to a stream of text."""
  if sys.stdin.isatty():
    import readline  # noqa: F401  (for history and editing)
  messages, turn = [*system], 0
  while True:
    try:
      text = input('> ' if sys.stdin.isatty() else '').removeprefix('\ufeff')  # the byte order mark of a file of messages
    except EOFError:
      return
    if text == '/new':
      messages = [*system]
      continue
    messages.append({'role': 'user', 'content': text})
    messages.append({'role': 'assistant', 'content': _show(answer(read(messages, 'the conversation'), turn))})
    turn += 1


def _show(stream: Iterator[tuple[int, str]]) -> str:
  """Prints a stream of text, until Ctrl-C in a conversation; returns the text."""
  shown = ''
  before = signal.getsignal(signal.SIGINT)
  if _CHAT.value:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    for _, piece in stream:
      shown += piece
      print(piece, end='', flush=True)
  except KeyboardInterrupt as interrupt:
    if not _CHAT.value or isinstance(interrupt, signals.Interrupted):  # by SIGTERM
      raise
  finally:
    signal.signal(signal.SIGINT, before)
  print(flush=True)
  return shown


def _write(rows: list[tuple[Any, list[int]]], run: Callable) -> None:
  """Continues all rows in batches, and prints the texts or writes them to a file atomically."""
  from gptjax.data import ProgressBar

  lines = []
  with ProgressBar('generating', len(rows), 'texts', shown=distributed.is_primary()) as work:
    for first in range(0, len(rows), _BATCH.value):
      some = rows[first:first + _BATCH.value]
      for (prompt, _), found in zip(some, run([ids for _, ids in some], first), strict=True):
        kind = 'prompt' if isinstance(prompt, str) else 'messages'
        if _OUT.value:
          lines.append(json.dumps({kind: prompt, 'text': found.text, 'ids': found.ids, 'logprobs': found.logprobs, 'ended': found.ended}))
        else:
          print(f'{prompt if kind == "prompt" else ""}{found.text}\n---', flush=True)
      work.advance(len(some))
  if _OUT.value and distributed.is_primary():
    write_results(expanded(_OUT.value), '\n'.join(lines) + '\n')


def script() -> None:
  """The command gptjax-generate."""
  configs.run(main, needs_config=False)


if __name__ == '__main__':
  script()
