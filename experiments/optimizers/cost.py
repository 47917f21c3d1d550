"""CPU time of a step with each optimizer: taskset -c 0 python -m experiments.optimizers.cost > experiments/optimizers/cost.csv

The steps are those of the sweep's recipe on random rows. Blocks of steps alternate between the optimizers, and CPU-seconds of the process
are counted, so that other load on the machine matters little.
"""

import time

import numpy as np

from experiments.optimizers.sweep import RATE
from gptjax import config as configs

BLOCKS, STEPS = 8, 50


def main(_: object) -> None:
  import jax
  jax.config.update('jax_platforms', 'cpu')
  from gptjax import model, sharding, training

  config = configs.override(configs.load('configs/experiment.py'), {'model.vocab_size': 257})  # bytes, and the end of a document
  mesh = sharding.make_mesh(configs.MeshConfig(data=1), jax.devices()[:1])
  shape = config.batch_size, config.data.context
  tokens = np.random.default_rng(0).integers(0, 256, shape, np.int32)
  with jax.set_mesh(mesh):
    described = model.model_of(config)
    batch = sharding.put_rows(mesh, {'tokens': tokens, 'targets': tokens, 'mask': np.ones(shape, np.float32)}, shape[0])

    def begin(name: str):
      settings = configs.override(config, {'optimizer.name': name}).optimizer
      optimizer = training.make_optimizer(settings)
      rates = training.learning_rates(settings, steps=400, warmup=40, decay=0)
      step = training.train_step(described, training.next_token(), optimizer, rates, zero_stage=0, mesh=mesh, microbatches=1, seed=0)
      return step, training.initializer(described, optimizer, 0, mesh, 0)()

    steps, states = {}, {}
    for name in RATE:
      steps[name], states[name] = begin(name)
    print('optimizer,milliseconds')
    for block in range(BLOCKS + 1):  # the first one compiles
      for name, step in steps.items():
        begun = time.process_time()
        for _ in range(STEPS):
          states[name], metrics = step(states[name], batch)
        jax.block_until_ready(metrics)
        if block:
          print(f'{name},{1000 * (time.process_time() - begun) / STEPS:.3f}')


if __name__ == '__main__':
  configs.run(main, needs_config=False)
