"""Plans the layouts of sweep.py and compiles their steps: python -m experiments.parallelism.measure --out=layouts.csv

Memory and traffic are read from the programs that XLA makes for eight virtual devices of the CPU, which then run a few steps on random
tokens, so that their losses can be compared. With `--topology`, the layouts of large.py are planned for that machine and not compiled.
"""

import csv
import io
import math
from typing import Any

from absl import flags

from gptjax import config as configs
from gptjax.config import LAYERS_AXIS, Config
from gptjax.start import start

_OUT = flags.DEFINE_string('out', None, 'CSV file to write', required=True)
_ONLY = flags.DEFINE_multi_string('only', None, 'name of a layout, as often as there are some; default: all')
_TOPOLOGY = flags.DEFINE_string('topology', None, 'machine to plan for, such as v5p:4x4x4')
DEVICES, STEPS = 8, 2
SMALL = 64
"""bytes; smaller payloads are scalars: losses, counts of targets and the norm of the gradients"""


def main(_: object) -> None:
  from experiments.parallelism import large, sweep
  from experiments.parallelism.sweep import resolved
  from gptjax.data import ProgressBar
  from gptjax.files import writable, write_atomic
  from gptjax.planning import parse
  path = writable(_OUT.value, '--out')
  topology = parse(_TOPOLOGY.value) if _TOPOLOGY.value else None
  flags.FLAGS['cpu_devices'].value = DEVICES
  start()
  found = resolved(large.get_sweep(), large.LAYOUTS) if topology else resolved(sweep.get_sweep(), sweep.LAYOUTS)
  if wrong := [name for name in _ONLY.value or () if name not in found]:
    raise configs.UserError('--only', wrong[0], f'one of {"; ".join(found)}', list(found), wrong[0])
  found = {name: found[name] for name in _ONLY.value or found}
  rows = []
  with ProgressBar('planning' if topology else 'compiling', len(found), 'layouts') as bar:
    for name, config in found.items():
      rows.append({'layout': name, **(planned(config, topology) if topology else compared(config))})
      text = io.StringIO()
      table = csv.DictWriter(text, rows[0], lineterminator='\n')
      table.writeheader()
      table.writerows(rows)
      write_atomic(path, text.getvalue())  # as far as it is
      bar.advance(1)


def planned(config: Config, topology: Any) -> dict[str, Any]:
  """The plan of a layout for a machine: bytes per device, by part and by mesh axis sent per step, and the bounds of the time of a step."""
  from gptjax.planning import estimate
  from gptjax.planning.volumes import by_axis, schedule_of
  one = estimate(config, topology)
  sent = by_axis(one.analytic)
  return {
    **{part: round(getattr(one.memory, part)) for part in ('state', 'gathered', 'gradients', 'activations', 'temporaries', 'total')},
    'available': round(one.available), **{f'sent over {axis}': round(sent.get(axis, 0)) for axis in one.sizes},
    'bubble': round(schedule_of(config, one.sizes).bubble, 4), 'seconds at best': round(one.bounds.overlapped, 4),
    'seconds in sequence': round(one.bounds.sequential, 4), 'bottleneck': one.bounds.bottleneck}


def compared(config: Config) -> dict[str, Any]:
  """Figures of a layout per device, planned and compiled: bytes of the state, of the rest and sent per step; idle ticks; a loss."""
  from gptjax.planning import analytic_memory, collectives, theoretical
  from gptjax.planning.program import compile_on
  from gptjax.planning.volumes import schedule_of
  from gptjax.sharding import make_mesh
  mesh = make_mesh(config.mesh)
  sizes = dict(mesh.shape)
  schedule = schedule_of(config, sizes)
  program = compile_on(mesh, config)
  memory, text = program.memory_analysis(), program.as_text()
  assert memory is not None and text is not None
  plan = analytic_memory(config, sizes)
  share = schedule.microbatches * schedule.chunks / schedule.ticks if schedule.stages > 1 else 1.0
  sent = {'planned': theoretical(config, sizes), 'compiled': collectives(text, sizes, share)}
  row: dict[str, Any] = {
    'devices': ' '.join(f'{axis} {size}' for axis, size in sizes.items() if size > 1),
    'planned state': round(plan.state), 'compiled state': memory.argument_size_in_bytes,
    'planned rest': round(plan.total - plan.state),
    'compiled rest': memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes}
  for kind in ('all-reduce', 'reduce-scatter', 'all-gather', 'all-to-all', 'collective-permute'):
    for source, some in sent.items():
      row[f'{source} {kind}'] = round(sum(one.total for one in some if one.kind.endswith(kind) and one.payload >= SMALL))
  # A stage sends at every tick, idle or not, so the permutes tell how many ticks the program has.
  ticks = max((one.trips for one in sent['compiled'] if one.axes == (LAYERS_AXIS,)), default=schedule.ticks)
  return row | {'idle by the paper': round(idle(config, schedule.stages), 4), 'planned idle': round(schedule.bubble, 4),
                'compiled idle': round(1 - 3 * schedule.microbatches * schedule.chunks / ticks, 4),
                'loss': f'{trained(program, mesh, config):.6f}'}


def idle(config: Config, stages: int) -> float:
  """The idle share of a pipeline by the formulas of its paper, where F, B and W take equal time: GPipe and 1F1B, arXiv:1811.06965, section
  2.3; interleaved, arXiv:2104.04473, section 2.2; ZB-H1, arXiv:2401.10241, table 2."""
  passes = 1 if config.pipeline.schedule == 'ZBH1' else 3
  waiting = (stages - 1) * passes / config.pipeline.chunks
  return waiting / (3 * config.microbatches + waiting)


def trained(program: Any, mesh: Any, config: Config) -> float:
  """The loss of the last of a few steps on random tokens, which are the same for every layout."""
  import jax
  import numpy as np

  from gptjax.model import model_of
  from gptjax.sharding import put_rows
  from gptjax.training import initializer, make_optimizer
  ids = np.random.default_rng(0).integers(0, config.model.vocab_size, (config.batch_size, config.data.context + 1), np.int32)
  rows = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'mask': np.ones((config.batch_size, config.data.context), np.float32)}
  loss = math.nan
  with jax.set_mesh(mesh):
    state = initializer(model_of(config), make_optimizer(config.optimizer), config.zero_stage, mesh, config.seed)()
    for _ in range(STEPS):
      state, metrics = program(state, put_rows(mesh, rows, config.batch_size))
      loss = float(metrics['loss'])
  return loss


if __name__ == '__main__':
  configs.run(main, needs_config=False)
