"""Cuts a store of bytes into pieces of text and writes samples of them that repeats need:

python -m experiments.data_mixture.pieces --store=stores/mixture/code --out=stores/mixture

The sample of a seed for k passes is the first 1/k of its sample for one pass, so that runs differ by how much of one text they see.
"""

import json
import random

from absl import flags

from experiments.data_mixture.sweep import ALL, PASSES, PIECE, SEEDS, pieces
from gptjax import config as configs

_STORE = flags.DEFINE_string('store', None, 'folder of a token store of bytes', required=True)
_OUT = flags.DEFINE_string('out', None, 'folder for code_PASSES_SEED.jsonl', required=True)


def main(_: object) -> None:
  from gptjax.data import TokenStore
  from gptjax.data.tokenizers import ByteTokenizer
  from gptjax.files import expanded, write_atomic
  store = TokenStore.open(_STORE.value)
  tokenizer, starts = store.tokenizer(), store.starts(0, store.documents)
  if not isinstance(tokenizer, ByteTokenizer):
    raise configs.UserError('--store', _STORE.value, 'a store of bytes, by --tokenizer=bytes')
  texts = (tokenizer.decode(store.read([start], [stop - start]).tolist()) for start, stop in zip(starts, starts[1:]))
  found = [piece for text in texts for piece in pieces(text)]
  if len(found) < ALL // PIECE:
    raise configs.UserError('--store', _STORE.value, f'{ALL:,} tokens or more in complete pieces of {PIECE}; it has {len(found)} pieces')
  out = expanded(_OUT.value, '--out')
  out.mkdir(parents=True, exist_ok=True)
  for seed in range(SEEDS):
    chosen = random.Random(seed).sample(found, ALL // PIECE)
    for passes in PASSES:
      lines = [json.dumps({'text': piece}) for piece in chosen[:len(chosen) // passes]]
      write_atomic(out / f'code_{passes}_{seed}.jsonl', '\n'.join([*lines, '']))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
