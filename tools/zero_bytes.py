"""Memory per device at each ZeRO stage: python -m tools.zero_bytes --cpu_devices=8 [--picture=FILE.png]

Creates the train state of a model in float32 with Adam on 2, 4 and 8 devices, adds up the shards of one device, and prints bytes per
parameter next to those of the paper (arXiv:1910.02054, figure 1, with 4 + 4 + 8 bytes): 16, 8 + 8/d, 4 + 12/d, 16/d.
"""

import math
from pathlib import Path

from absl import flags

from gptjax import config as configs
from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, OptimizerConfig
from gptjax.files import save_figure, write_json
from gptjax.start import start

_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a plot of the table')
_JSON = flags.DEFINE_string('json', None, 'file for the figures')

MODEL = ModelConfig(layers=4, width=256, heads=8, vocab_size=4096)
PARTS = ('parameters', 'gradients', 'optimizer')


def expected(stage: int, data: int) -> float:
  """Bytes per parameter according to the paper."""
  return (16, 8 + 8 / data, 4 + 12 / data, 16 / data)[stage]


def held(stage: int, data: int) -> dict[str, float]:
  """Bytes per parameter on the first device, by part of the state."""
  import jax

  from gptjax.model import abstract_model
  from gptjax.sharding import make_mesh
  from gptjax.training import initializer, make_optimizer
  mesh = make_mesh(MeshConfig(data=data))
  with jax.set_mesh(mesh):
    model = abstract_model(MODEL, ComputeConfig(scan=True), 256)
    state = initializer(model, make_optimizer(OptimizerConfig()), stage, mesh, 0)()
    # Gradients exist only inside the step; arrays of zeros with their shardings stand for them.
    zeros = lambda name: jax.numpy.zeros(model.shapes[name].shape, out_sharding=model.specs(stage, mesh)[name].gradient)
    trees = (state.parameters, {name: zeros(name) for name in model.shapes}, state.optimizer)
  count = sum(math.prod(shape.shape) for shape in model.shapes.values())
  first = mesh.devices.flat[0]
  own = lambda tree: sum(shard.data.nbytes for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards if shard.device == first)
  return {part: own(tree) / count for part, tree in zip(PARTS, trees, strict=True)}


def main(_) -> None:
  start()
  import jax
  sizes = [data for data in (2, 4, 8) if data <= jax.device_count()]
  if not sizes:
    raise configs.UserError('--cpu_devices', jax.device_count(), '2 devices or more, as --cpu_devices=8')
  table = [{'stage': stage, 'data': data, **held(stage, data), 'paper': expected(stage, data)} for stage in range(4) for data in sizes]
  print(f'{"stage":>5} {"data":>5} ' + ' '.join(f'{part:>11}' for part in PARTS) + f' {"in all":>8} {"paper":>8}   bytes per parameter')
  for row in table:
    print(f'{row["stage"]:>5} {row["data"]:>5} ' + ' '.join(f'{row[part]:>11.3f}' for part in PARTS)
          + f' {sum(row[part] for part in PARTS):>8.3f} {row["paper"]:>8.3f}')
  if _JSON.value:
    write_json(Path(_JSON.value), table)
  if _PICTURE.value:
    draw(table, Path(_PICTURE.value))


def draw(table: list[dict], path: Path) -> None:
  """The paper's figure 1: for each number of devices, a stacked bar per stage."""
  from matplotlib.figure import Figure
  sizes = sorted({row['data'] for row in table})
  figure = Figure(figsize=(3.2 * len(sizes), 3.6), layout='constrained')
  axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
  for axis, data in zip(axes, sizes):
    rows = [row for row in table if row['data'] == data]
    below = [0.0] * len(rows)
    for part in PARTS:
      values = [row[part] for row in rows]
      axis.bar([row['stage'] for row in rows], values, bottom=below, label=part)
      below = [a + b for a, b in zip(below, values)]
    axis.plot([row['stage'] for row in rows], [row['paper'] for row in rows], 'k_', markersize=26, label='paper')
    for row, height in zip(rows, below):
      axis.text(row['stage'], height + 0.2, f'{height:.2f}', ha='center')
    axis.set(title=f'{data} devices', xlabel='ZeRO stage', xticks=range(4), ylim=(0, 18.5))
  axes[0].set_ylabel('bytes per parameter on a device')
  axes[-1].legend(loc='upper right', fontsize='small')
  save_figure(figure, path, dpi=120)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
