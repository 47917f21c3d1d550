"""Trains one small model on every mesh, at every ZeRO stage: python -m tests.acceptance.stages

Virtual devices, 8 of them or two replicas of 8; stages 0 to 3, meshes 8 x 1 to 1 x 8, accumulation over 1 and 4 microbatches, layers
scanned and unrolled; 8 query heads, 2 key/value heads, an odd vocabulary and an odd feed-forward width. Prints a JSON object: for each
case the largest relative difference of a step's loss and gradient norm from those of one device, one microbatch, without a scan.
"""

import itertools
import json
import sys
from collections.abc import Iterator

import numpy as np
from absl import flags

from gptjax import config as configs
from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, OptimizerConfig
from gptjax.start import start

_CASES = flags.DEFINE_list('cases', ['adamw', 'dropout', 'muon'], 'what to follow: AdamW, AdamW with dropout, Muon with dropout')
_STEPS = flags.DEFINE_integer('steps', 10, 'updates of each run', lower_bound=1)

MESHES = ((8, 1), (4, 2), (2, 4), (1, 8))
"""data x model"""
REPLICATED = MESHES[:3]
"""meshes that two replicas have too, with 4 microbatches"""
BATCH, CONTEXT, VOCABULARY = 64, 16, 257


def follow(case: str, mesh: MeshConfig, stage: int, microbatches: int, scan: bool) -> np.ndarray:
  """Loss and gradient norm of every step."""
  import jax

  from gptjax.model import abstract_model
  from gptjax.sharding import make_mesh, put_rows
  from gptjax.training import initializer, learning_rates, make_optimizer, next_token, train_step

  model = ModelConfig(layers=2, width=64, heads=8, kv_heads=2, mlp_width=171, vocab_size=VOCABULARY, vocab_multiple=1,
                      positions='rope', norm='rmsnorm', mlp='swiglu', dropout=0.0 if case == 'adamw' else 0.1)
  settings = OptimizerConfig(name='muon' if case == 'muon' else 'adamw', peak_lr=1e-3, warmup=2)
  durations = {'steps': 100, 'warmup': 2, 'decay': 0}
  with jax.set_mesh(devices := make_mesh(mesh)):
    described, optimizer = abstract_model(model, ComputeConfig(scan=scan), CONTEXT), make_optimizer(settings)
    state = initializer(described, optimizer, stage, devices, 0)()
    step = train_step(described, next_token(), optimizer, learning_rates(settings, **durations), zero_stage=stage,
                      mesh=devices, microbatches=microbatches, seed=0)
    figures = []
    for number in range(_STEPS.value):
      rng = np.random.default_rng(number % 3)
      ids = rng.integers(0, VOCABULARY, (BATCH, CONTEXT + 1), np.int32)
      rows = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'mask': (rng.random((BATCH, CONTEXT)) < 0.7).astype(np.float32)}
      state, metrics = step(state, put_rows(devices, rows, BATCH))
      figures.append([float(metrics['loss']), float(metrics['grad_norm'])])
  return np.array(figures)


def layouts() -> Iterator[tuple[MeshConfig, int, bool]]:
  """(mesh, microbatches, scan) of all runs at each stage."""
  for mesh, microbatches, scan in itertools.product(MESHES, (1, 4), (False, True)):
    yield MeshConfig(*mesh), microbatches, scan
  for mesh in REPLICATED:
    yield MeshConfig(*mesh, replica=2), 4, True


def main(_) -> None:
  flags.FLAGS.cpu_devices = 16
  start()
  worst: dict[str, dict[str, float]] = {}
  for case in _CASES.value:
    one = follow(case, MeshConfig(data=1), 0, 1, scan=False)
    for (mesh, microbatches, scan), stage in itertools.product(layouts(), range(4)):
      difference = np.abs(follow(case, mesh, stage, microbatches, scan) / one - 1).max()
      name = f'{describe(mesh)} stage {stage}, {microbatches} microbatches, {"scan" if scan else "unrolled"}'
      worst.setdefault(case, {})[name] = float(difference)
      print(f'{case} {name}: {difference:.1e}', file=sys.stderr, flush=True)
  print(json.dumps(worst))


def describe(mesh: MeshConfig) -> str:
  return f'{mesh.data}x{mesh.model}' + (f' x {mesh.replica} replicas' if mesh.replica > 1 else '')


if __name__ == '__main__':
  configs.run(main, needs_config=False)
