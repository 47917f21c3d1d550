"""Decodes with every family, and compares each step with a full forward pass: python -m tests.acceptance.decoded

Prints a JSON object: for each model how many tokens were drawn, how many of them a full pass over the text so far would not have
drawn, and the largest difference of a logit.
"""

import json
import sys
from typing import Any

import numpy as np

from gptjax import config as configs
from gptjax.start import start

_DECODER = {'vocab_size': 211, 'hidden_size': 64, 'intermediate_size': 96, 'num_hidden_layers': 7, 'num_attention_heads': 4,
            'num_key_value_heads': 2, 'head_dim': 16, 'max_position_embeddings': 128, 'sliding_window': 9}
_OTHER = {'num_key_value_heads': 4, 'tie_word_embeddings': True, 'sliding_window': 40, 'head_dim': 24}
_LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 500.0, 'factor': 4.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
           'original_max_position_embeddings': 32}
_GPT2 = {'vocab_size': 211, 'n_positions': 128, 'n_embd': 64, 'n_layer': 3, 'n_head': 4}
LENGTHS, NEW = (1, 3, 16, 31, 50), 64


def follow(name: str, fields: dict[str, Any]) -> dict[str, float]:
  """One model of a family, with random values."""
  import jax

  from gptjax.inference import Decoder, Sampling, decoding
  from gptjax.interop import FAMILIES, Fields
  from gptjax.model import abstract_model
  from gptjax.sharding import tensor_shard_map

  mesh = jax.sharding.get_mesh()
  config, context = FAMILIES[name].read(Fields(fields))
  model = abstract_model(config, configs.ComputeConfig(), context)
  rng = np.random.default_rng(0)
  gain = lambda name: name.endswith('gain') and config.norm != 'rmsnorm1p'
  # Smaller in tables than in blocks: a tied model would only repeat its last id.
  parameters = jax.device_put({name: (0.03 if 'blocks' not in name else 0.2) * rng.standard_normal(shape.shape, np.float32) + gain(name)
                               for name, shape in model.shapes.items()}, model.shardings(0, mesh))
  prompts = [rng.integers(0, 211, length).tolist() for length in LENGTHS]
  seen: list[np.ndarray] = []
  sample = decoding.sample

  def recorded(logits, *rest):
    def record(x):
      jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
      return x
    both = jax.sharding.PartitionSpec(None, None)  # callbacks take no arrays with explicit axes
    return sample(tensor_shard_map(record, both, both)(logits), *rest)

  decoding.sample = recorded
  decoder = Decoder(model, mesh)
  steps = decoder(decoder.prepare(parameters), prompts, Sampling(temperature=0.0), range(len(prompts)), NEW)
  drawn = np.stack([ids for ids, _ in steps], 1)
  jax.effects_barrier()
  decoding.sample = sample

  full = jax.jit(lambda parameters, tokens: model.merge(parameters)(tokens)[0])
  different, worst = 0, 0.0
  for row, prompt in enumerate(prompts):
    tokens = np.zeros((1, context), np.int32)  # what comes later changes nothing before it
    tokens[0, :len(prompt) + NEW] = [*prompt, *drawn[row]]
    logits = np.asarray(full(parameters, tokens))[len(prompt) - 1:len(prompt) - 1 + NEW, :211]
    different += int((logits.argmax(-1) != drawn[row]).sum())
    worst = max(worst, float(np.abs(logits - np.stack([step[row, :211] for step in seen])).max()))
  assert len(seen) == NEW and len(np.unique(drawn)) > 20, 'texts that would agree by accident'
  return {'tokens': drawn.size, 'different': different, 'logits': worst}


def main(_) -> None:
  start()
  import jax

  from gptjax.interop import FAMILIES
  from gptjax.sharding import make_mesh

  shapes = {name: [_DECODER, _DECODER | _OTHER] for name in FAMILIES} | {'gpt2': [_GPT2, _GPT2 | {'n_embd': 48, 'n_head': 2}]}
  shapes['llama'].append(_DECODER | {'rope_parameters': _LLAMA3})
  found = {}
  with jax.set_mesh(make_mesh(configs.MeshConfig())):
    for name, cases in shapes.items():
      for index, fields in enumerate(cases):
        found[f'{name} {index}'] = follow(name, fields)
        print(name, index, found[f'{name} {index}'], file=sys.stderr, flush=True)
  print(json.dumps(found))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
