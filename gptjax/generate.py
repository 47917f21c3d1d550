"""Continues texts with a trained model.

  python -m gptjax.generate --workdir=DIR --prompt='def '
  python -m gptjax.generate --workdir=DIR --prompts=FILE --out=FILE.jsonl
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import config as configs
from gptjax import processes
from gptjax.config import UserError
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to use: latest, best (lowest validation loss), or a step')
_MODEL_AXIS = flags.DEFINE_integer(
  'model_axis', 0, 'devices that share each matrix; 0: as in training, where the devices here allow it', lower_bound=0)
_PROMPT = flags.DEFINE_string('prompt', '', 'text to continue')
_PROMPTS = flags.DEFINE_string('prompts', None, 'file of texts to continue instead: one a line, or JSON lines with a field "prompt"')
_OUT = flags.DEFINE_string('out', None, 'file for JSON lines of prompt, text, ids, logprobs (nats) and ended; default: text on the screen')
_SAMPLES = flags.DEFINE_integer('samples', 1, 'continuations of each prompt', lower_bound=1)
_BATCH = flags.DEFINE_integer('batch_size', 8, 'rows that are continued together', lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 200, 'most tokens to add; fewer where the document ends', lower_bound=1)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.8, 'divides the logits; 0: always the likeliest token')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'draw only from this many likeliest tokens; 0: from all')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'draw only from the likeliest tokens that together have this probability; 1: from all')
_MIN_P = flags.DEFINE_float('min_p', 0.0, "draw only from tokens of at least this share of the likeliest one's probability; 0: from all")
_PENALTY = flags.DEFINE_float('repetition_penalty', 1.0, 'divides the logits of tokens that the text has already; 1: none')
_STOP = flags.DEFINE_multi_string('stop', [], 'text that ends a continuation, which then is without it; may be given several times')
_STOP_IDS = flags.DEFINE_multi_integer('stop_ids', None, "token ids that end it instead of the tokenizer's; may be given several times")
_SEED = flags.DEFINE_integer('seed', 0, 'of the draws; the row after has the next', lower_bound=0, upper_bound=2**32 - 1)


def main(_) -> None:
  start()
  import jax

  from gptjax import checkpoint, data, inference

  sampling = inference.Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _MIN_P.value, _PENALTY.value)
  texts = _texts()
  workdir = Path(_WORKDIR.value).expanduser()
  out = Path(_OUT.value).expanduser() if _OUT.value else None
  if out and not out.absolute().parent.is_dir():
    raise UserError('--out', str(out), f'a file in a folder that is there; {out.absolute().parent} is not')
  trained = checkpoint.load_trained(workdir, _STEP.value, _MODEL_AXIS.value)
  tokenizer = data.open_held_out(workdir / 'data').tokenizer
  with jax.set_mesh(trained.mesh):
    generator = inference.Generator(trained.blueprint, trained.mesh, tokenizer)
    prompts = [generator.prompt(text, source) for source, text in texts]  # what is wrong with one is told before anything is printed
    if processes.first():
      print(trained.description, file=sys.stderr)
      for (source, _), prompt in zip(texts, prompts, strict=True):
        if len(prompt) > trained.blueprint.context:
          print(f'{source}: {len(prompt)} tokens, of which the model reads the last {trained.blueprint.context}', file=sys.stderr)
    weights = generator.prepare(trained.parameters)
    settings: dict[str, Any] = {'max_tokens': _MAX_TOKENS.value, 'sampling': sampling, 'stop': _STOP.value, 'stop_ids': _STOP_IDS.value}
    if len(prompts) * _SAMPLES.value == 1 and not out:
      _show(texts[0][1], generator.stream(weights, prompts, seeds=[_SEED.value], **settings))
      return
    rows = [(text, prompt) for (_, text), prompt in zip(texts, prompts, strict=True) for _ in range(_SAMPLES.value)]
    _write(rows, lambda some, seeds: generator(weights, some, seeds=seeds, **settings), out)


def _texts() -> list[tuple[str, str]]:
  """(what an error calls it, text) of each prompt."""
  if not _PROMPTS.value:
    return [('--prompt', _PROMPT.value)]
  if _PROMPT.value:
    raise UserError('--prompt', _PROMPT.value, 'none beside --prompts')
  path = Path(_PROMPTS.value).expanduser()
  try:
    lines = path.read_text(encoding='utf-8').splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError('--prompts', str(path), f'a file of UTF-8 text ({getattr(error, "strerror", None) or error})') from None
  named = [(f'{path}:{number}', line) for number, line in enumerate(lines, 1) if line]
  found = [(source, _text_of(source, line) if path.suffix == '.jsonl' else line) for source, line in named]
  if not found:
    raise UserError('--prompts', str(path), 'a file with a prompt in it')
  return found


def _text_of(source: str, line: str) -> str:
  try:
    text = json.loads(line)['prompt']
  except (ValueError, KeyError, TypeError):
    text = None
  if not isinstance(text, str):
    raise UserError(source, line[:80], 'a JSON object with a text "prompt"')
  return text


def _show(prompt: str, stream: Iterator[tuple[int, str]]) -> None:
  """Prints a text as it comes."""
  print(prompt, end='', flush=True)
  for _, piece in stream:
    sys.stdout.write(piece)
    sys.stdout.flush()
  print()


def _write(rows, run, out: Path | None) -> None:
  """Continues all rows, some at a time, and prints them or writes them to a file, which is whole or not there."""
  from rich.console import Console
  from rich.progress import track

  from gptjax.files import write_whole

  console = Console(stderr=True)
  lines = []
  for at in track(range(0, len(rows), _BATCH.value), 'generating', console=console, transient=True,
                     disable=not (console.is_terminal and processes.first())):
    some = rows[at:at + _BATCH.value]
    seeds = [(_SEED.value + at + index) % 2**32 for index in range(len(some))]
    for (text, _), said in zip(some, run([prompt for _, prompt in some], seeds), strict=True):
      if out:
        lines.append(json.dumps({'prompt': text, 'text': said.text, 'ids': said.ids, 'logprobs': said.logprobs, 'ended': said.ended}))
      else:
        print(f'{text}{said.text}\n---', flush=True)
  if out and processes.first():
    write_whole(out, '\n'.join(lines) + '\n')


if __name__ == '__main__':
  configs.run(main, needs_config=False)
