"""What the compiled step sends: python -m tests.acceptance.exchanges

Compiles the step of a small float32 model on 8 virtual devices at every stage of ZeRO, with 1 and with 4 microbatches. Prints a JSON list;
each entry has the payloads, per byte of the parameters, of the collectives of one kind.
"""

import json
import sys
from collections import Counter

import numpy as np
from absl import flags

from gptjax import config as configs
from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, OptimizerConfig
from gptjax.start import start

MODEL = ModelConfig(layers=4, width=256, heads=8, vocab_size=2048)
CONTEXT, BATCH = 32, 32
SCALARS = 64
"""bytes; smaller payloads are those of the loss, its targets and the norm of the gradients"""


def sent(stage: int, microbatches: int) -> dict[str, float]:
  """Payloads by kind, per byte of the parameters."""
  import jax

  from gptjax.model import abstract_model
  from gptjax.planning import collectives
  from gptjax.sharding import make_mesh, put_rows
  from gptjax.training import abstract, initializer, learning_rates, make_optimizer, next_token, train_step

  settings, durations = OptimizerConfig(clip=1.0), {'steps': 100, 'warmup': 0, 'decay': 0}
  with jax.set_mesh(mesh := make_mesh(MeshConfig(data=8))):
    model, optimizer = abstract_model(MODEL, ComputeConfig(scan=True), CONTEXT), make_optimizer(settings)
    state = abstract(initializer(model, optimizer, stage, mesh, 0), mesh)
    step = train_step(model, next_token(), optimizer, learning_rates(settings, **durations), zero_stage=stage, mesh=mesh,
                      microbatches=microbatches, seed=0)
    rows = {name: np.zeros((BATCH, CONTEXT), dtype) for name, dtype in (('tokens', 'int32'), ('targets', 'int32'), ('mask', 'float32'))}
    text = step.lower(state, put_rows(mesh, rows, BATCH)).compile().as_text()
  found: Counter[str] = Counter()
  for one in collectives(text, dict(mesh.shape)):
    if one.payload > SCALARS:
      found[one.kind] += one.payload * one.trips
  return {kind: count / (4 * sum(shape.size for shape in model.shapes.values())) for kind, count in found.items()}


def main(_) -> None:
  flags.FLAGS.cpu_devices = 8
  start()
  found = []
  for stage in range(4):
    for microbatches in (1, 4):
      found.append({'stage': stage, 'microbatches': microbatches, 'sent': sent(stage, microbatches)})
      print(found[-1], file=sys.stderr, flush=True)
  print(json.dumps(found))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
