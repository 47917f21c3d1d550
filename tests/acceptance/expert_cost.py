"""CPU-seconds of a layer of experts relative to those of a dense one: python -m tests.acceptance.expert_cost

It runs on one core, so that waiting threads count nothing, and prints a JSON object: the ratio by the number of experts.
"""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import heap
from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, RouterConfig
from gptjax.model import abstract_model
from gptjax.sharding import make_mesh

TOKENS, WIDTH, FEATURES, CHOICES = 4096, 512, 2048, {8: 2, 64: 8}
"""Tokens of a step, width and active hidden features, in OLMoE's proportion, and the experts per token by the number of experts."""


def ratio(experts: int, chosen: int) -> float:
  """CPU-seconds of a layer of experts relative to those of a dense one."""
  plain = ModelConfig(layers=1, width=WIDTH, mlp_width=FEATURES, mlp='swiglu', bias=False, vocab_size=256)
  mixture = ModelConfig(layers=1, width=WIDTH, mlp='swiglu', bias=False, vocab_size=256, experts=experts, experts_per_token=chosen,
                        expert_width=FEATURES // chosen, router=RouterConfig(balance_loss=0.01, z_loss=0.001))

  def gradient(config, devices):
    model = abstract_model(config, ComputeConfig(), 256)
    parameters = model.initialize(jax.random.key(0), model.shardings(0, devices))

    @jax.jit
    def run(parameters, x, dy):
      def loss(parameters, x):
        layer = model.merge(parameters).blocks[0].mlp
        y, sums = layer(x, 0, jnp.ones((TOKENS // 256, 256)), None) if config.experts else (layer(x, None), {'loss': 0.0})
        return (y * dy).sum() + sums['loss'], y
      return jax.grad(loss, (0, 1), has_aux=True)(parameters, x)  # without y, the last product would be left out
    return run, parameters

  with jax.set_mesh(devices := make_mesh(MeshConfig(1, 1), jax.devices()[:1])):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32) for _ in range(2))
    runs = [gradient(config, devices) for config in (plain, mixture)]
    best = [float('inf')] * 2
    for _ in range(6):  # in turns, so that both see the same machine
      for index, (run, parameters) in enumerate(runs):
        begin = time.process_time()
        jax.block_until_ready(run(parameters, x, dy))
        best[index] = min(best[index], time.process_time() - begin)
  return best[1] / best[0]


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')
  heap.keep_freed_memory()  # as gptjax.start does
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before JAX starts its threads
  print(json.dumps({experts: ratio(experts, chosen) for experts, chosen in CHOICES.items()}))
