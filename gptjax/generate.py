"""Continues a text with a trained model: python -m gptjax.generate --workdir=DIR --prompt='def '"""

import sys
from pathlib import Path

from absl import flags

from gptjax import config as configs
from gptjax import processes
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_STEP = flags.DEFINE_string('step', 'latest', 'checkpoint to use: latest, best (lowest validation loss), or a step')
_PROMPT = flags.DEFINE_string('prompt', '', 'text to continue')
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 200, 'most tokens to add; fewer where the document ends', lower_bound=1)
_TEMPERATURE = flags.DEFINE_float('temperature', 0.8, 'divides the logits; 0: always the likeliest token')
_TOP_K = flags.DEFINE_integer('top_k', 0, 'draw only from this many likeliest tokens; 0: from all')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'draw only from the likeliest tokens that together have this probability; 1: from all')
_SEED = flags.DEFINE_integer('seed', 0, 'of the draws', lower_bound=0, upper_bound=2**32 - 1)


def main(_) -> None:
  start()
  import jax

  from gptjax import checkpoint, data, inference

  sampling = inference.Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value)
  workdir = Path(_WORKDIR.value).expanduser()
  trained = checkpoint.load_trained(workdir, _STEP.value)
  tokenizer = data.open_held_out(workdir / 'data').tokenizer
  with jax.set_mesh(trained.mesh):
    tokenizer.encode(_PROMPT.value, '--prompt')  # what is wrong with it is told before it is printed
    if processes.first():
      print(trained.description, file=sys.stderr)
    never_drawn = inference.never_drawn(tokenizer, trained.config.model)
    generator = inference.Generator(trained.blueprint, trained.mesh, sampling, never_drawn)
    print(_PROMPT.value, end='', flush=True)
    for piece in generator.text(trained.parameters, tokenizer, _PROMPT.value, _MAX_TOKENS.value, jax.random.key(_SEED.value)):
      sys.stdout.write(piece)
      sys.stdout.flush()
    print()


if __name__ == '__main__':
  configs.run(main, needs_config=False)
