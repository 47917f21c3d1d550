"""Trains one small model on every mesh, at every ZeRO stage: python -m tests.acceptance.stages

8 virtual devices; stages 0 to 3, meshes 8 x 1 to 1 x 8, accumulation over 1 and 4 microbatches, layers scanned and unrolled; 8 query
heads, 2 key/value heads, an odd vocabulary and an odd feed-forward width. Prints a JSON object: for each case the largest relative
difference of a step's loss and gradient norm from those of one device.
"""

import json
import sys

import numpy as np
from absl import flags

from gptjax import config as configs
from gptjax.config import MeshConfig, ModelConfig, OptimizerConfig
from gptjax.start import start

_CASES = flags.DEFINE_list('cases', ['adamw', 'dropout', 'muon'], 'what to follow')
_STEPS = flags.DEFINE_integer('steps', 10, 'updates of each run', lower_bound=1)

MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
BATCH, CONTEXT, VOCABULARY = 32, 32, 257


def follow(case: str, mesh: tuple[int, int], stage: int, microbatches: int, scan: bool) -> np.ndarray:
  """Loss and gradient norm of every step."""
  import jax

  from gptjax.model import abstract_model
  from gptjax.sharding import make_mesh, place
  from gptjax.training import initializer, make_optimizer, next_token, schedule, train_step

  model = ModelConfig(layers=2, width=64, heads=8, kv_heads=2, mlp_width=171, vocab_size=VOCABULARY, vocab_multiple=1, scan=scan,
                      positions='rope', norm='rmsnorm', mlp='swiglu', dropout=0.1 if case == 'dropout' else 0.0)
  settings = OptimizerConfig(name='muon' if case == 'muon' else 'adamw', peak_lr=1e-3, warmup=2)
  durations = {'steps': 100, 'warmup': 2, 'decay': 0}
  with jax.set_mesh(make_mesh(MeshConfig(*mesh))) as _:
    devices = jax.sharding.get_mesh()
    plan, optimizer = abstract_model(model, CONTEXT), make_optimizer(settings, **durations)
    state = initializer(plan, optimizer, stage, devices, 0)()
    step = train_step(plan, next_token(), optimizer, schedule(settings, settings.peak_lr, **durations), zero_stage=stage,
                      mesh=devices, microbatches=microbatches, seed=0)
    figures = []
    for number in range(_STEPS.value):
      rng = np.random.default_rng(number % 3)
      ids = rng.integers(0, VOCABULARY, (BATCH, CONTEXT + 1), np.int32)
      rows = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'mask': (rng.random((BATCH, CONTEXT)) < 0.7).astype(np.float32)}
      state, metrics = step(state, place(devices, rows, 'batch', None))
      figures.append([float(metrics['loss']), float(metrics['grad_norm'])])
  return np.array(figures)


def main(_) -> None:
  flags.FLAGS.cpu_devices = 8
  start()
  worst: dict[str, dict[str, float]] = {}
  for case in _CASES.value:
    one: dict[tuple, np.ndarray] = {}
    for mesh in MESHES:
      for stage in range(4):
        for microbatches in (1, 4):
          for scan in (False, True):
            # Stacked layers draw other initial values; dropout is drawn for each microbatch.
            key = (scan, microbatches) if case == 'dropout' else (scan,)
            if key not in one:
              one[key] = follow(case, (1, 1), 0, microbatches, scan)
            difference = np.abs(follow(case, mesh, stage, microbatches, scan) / one[key] - 1).max()
            name = f'{mesh[0]}x{mesh[1]} stage {stage}, {microbatches} microbatches, {"scan" if scan else "unrolled"}'
            worst.setdefault(case, {})[name] = float(difference)
            print(f'{case} {name}: {difference:.1e}', file=sys.stderr, flush=True)
  print(json.dumps(worst))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
