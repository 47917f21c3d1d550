"""Measures decoding and prefill without a server: python -m tests.acceptance.bare_loop --workdir=RUN

Prints JSON: tokens per second of the decode loop by batch, seconds until the first token of one prompt by its length.
"""

import json
import random
import time
from pathlib import Path

from absl import flags

from gptjax import config as configs
from gptjax.start import start

_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of a run', required=True)
_BATCHES = flags.DEFINE_list('batches', ['8', '32'], 'texts at a time')
_PROMPT = flags.DEFINE_integer('prompt', 32, 'tokens of their prompts')
_TOKENS = flags.DEFINE_integer('tokens', 128, 'new tokens of each')
_PREFILLS = flags.DEFINE_list('prefills', ['32', '100', '256'], 'lengths of prompts whose first token is timed')
_REPEATS = 5


def main(_) -> None:
  start()  # with the memory of a server
  import jax

  from gptjax import checkpoint, data, inference
  from gptjax.inference.decoding import Decoder
  trained = checkpoint.load_trained(Path(_WORKDIR.value))
  tokenizer = data.open_held_out(Path(_WORKDIR.value) / 'data').tokenizer
  rng = random.Random(0)
  prompt = lambda length: [rng.randrange(1000, 50_000) for _ in range(length)]
  with jax.set_mesh(trained.mesh):
    decoder = Decoder(trained.model, trained.mesh, inference.suppressed_ids(tokenizer, trained.model.config))
    weights = decoder.prepare(trained.parameters)

    def seconds(prompts, tokens):
      """Until the first token, and from there to the last one."""
      begin = time.monotonic()
      for index, _ in enumerate(decoder(weights, prompts, inference.Sampling(1.0), range(len(prompts)), tokens)):
        if not index:
          first = time.monotonic()
      return first - begin, time.monotonic() - first

    rates, firsts = {}, {}
    for batch in map(int, _BATCHES.value):
      prompts = [prompt(_PROMPT.value) for _ in range(batch)]
      seconds(prompts, _TOKENS.value)  # compiles
      rates[batch] = batch * (_TOKENS.value - 1) / min(seconds(prompts, _TOKENS.value)[1] for _ in range(2))
    for length in map(int, _PREFILLS.value):
      seconds([prompt(length)], 1)
      firsts[length] = sorted(seconds([prompt(length)], 1)[0] for _ in range(_REPEATS))[_REPEATS // 2]
  print(json.dumps({'rates': rates, 'firsts': firsts}))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
