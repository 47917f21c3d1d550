"""Trains one small model in layouts of every kind of parallelism: python -m tests.acceptance.layouts

Layouts are chosen so that every pair of choices that one layout can have occurs: of mesh axes and their sizes, schedules, stages of ZeRO,
microbatches, remat, scan, and of what is trained. 8 virtual devices. Prints a JSON object: for each layout the largest relative difference
of a step's loss and of its gradient norm from one device.
"""

import functools
import itertools
import json
import random
import sys
from collections.abc import Callable

import numpy as np
from absl import flags

from gptjax import config as configs
from gptjax.config import Config, UserError
from gptjax.start import start

_STEPS = flags.DEFINE_integer('steps', 20, 'updates of each run', lower_bound=1)
_COUNT = flags.DEFINE_integer('count', 60, 'least number of layouts', lower_bound=1)
_PART = flags.DEFINE_string('part', '0/1', 'I/N: every N-th layout from the I-th on')

DEVICES, BATCH, BATCHES, CONTEXT, VOCABULARY = 8, 64, 3, 16, 61
MARGIN = 1e-6
"""Least distance of the score of a token's last expert from that of the next one. With 2e-7, one of 60 layouts chose another
expert in the last steps."""
DECIDED = 10
"""Factor of the routers' initial values: fresh ones, whose scores are all near 1 / experts, leave hardly any data such a margin."""
WHAT = {
  'model.experts': (0, 4), 'model.tied': (True, False), 'model.dropout': (0.0, 0.1), 'data.isolate_documents': (True, False),
  'optimizer.name': ('adamw', 'muon')}
"""Choices that change the results: each combination is compared with its own run on one device."""
HOW = {
  'mesh.pipe': (1, 2, 4, 8), 'mesh.replica': (1, 2), 'mesh.model': (1, 2), 'mesh.context': (1, 2, 4), 'mesh.expert': (1, 2, 4),
  'mesh.data': (1, 2, 4, 8), 'pipeline.schedule': ('GPipe', '1F1B', 'Interleaved1F1B', 'ZBH1'), 'pipeline.chunks': (1, 2),
  'compute.context_attention': ('ring', 'all_gather'), 'zero_stage': (0, 1, 2, 3), 'microbatches': (1, 4, 8),
  'compute.remat': ('none', 'dots', 'full'), 'compute.scan': (False, True)}
BASE = {
  'model.layers': 8, 'model.width': 32, 'model.heads': 4, 'model.kv_heads': 2, 'model.mlp_width': 48, 'model.vocab_size': VOCABULARY,
  'model.positions': 'rope', 'model.norm': 'rmsnorm', 'model.mlp': 'swiglu', 'model.bias': False, 'data.context': CONTEXT,
  'batch_size': BATCH, 'optimizer.warmup': 2, 'mesh.max_unsharded': 1.0}
EXPERTS = {'model.experts_per_token': 2, 'model.expert_width': 24, 'model.router.balance_loss': 0.01}

Layout = dict[str, object]


def possible(layout: Layout) -> bool:
  """Whether its sizes fit, and no choice is without effect."""
  sizes = [layout[name] for name in HOW if name.startswith('mesh.')]
  return (np.prod(sizes) == DEVICES
          and (layout['mesh.pipe'] > 1 or (layout['pipeline.schedule'], layout['pipeline.chunks']) == ('1F1B', 1))
          and layout['pipeline.chunks'] == (2 if layout['pipeline.schedule'] == 'Interleaved1F1B' else 1)
          and layout['mesh.pipe'] * layout['pipeline.chunks'] <= BASE['model.layers']
          and (layout['mesh.context'] > 1 or layout['compute.context_attention'] == 'ring')
          and (layout['mesh.expert'] == 1 or layout['model.experts'] > 0))


def pairs(layout: Layout) -> set[tuple]:
  """All pairs of its choices."""
  return set(itertools.combinations(sorted(layout.items()), 2))


def choose(count: int) -> list[Layout]:
  """Layouts in which every pair that is possible occurs, `count` of them at least."""
  rng, choices = random.Random(0), {**WHAT, **HOW}
  drawn: list[Layout] = []
  while len(drawn) < 5000:
    layout = {name: rng.choice(values) for name, values in choices.items()}
    rest = DEVICES // int(np.prod([layout[name] for name in HOW if name.startswith('mesh.') and name != 'mesh.data']))
    if rest and possible(layout := layout | {'mesh.data': rest}):
      drawn.append(layout)
  left, chosen = set().union(*map(pairs, drawn)), []
  while left or len(chosen) < count:
    best = max(drawn, key=lambda layout: len(pairs(layout) & left))
    drawn.remove(best)
    chosen.append(best)
    left -= pairs(best)
  return chosen


def config_of(layout: Layout) -> Config:
  """The config of a layout."""
  return configs.override(Config(), BASE | (EXPERTS if layout['model.experts'] else {}) | layout)


@functools.cache
def batch(seed: int, isolated: bool) -> dict[str, np.ndarray]:
  """Random rows of several documents each."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(0, VOCABULARY, (BATCH, CONTEXT + 1), np.int32)
  rows = {'tokens': ids[:, :-1], 'targets': ids[:, 1:], 'mask': (rng.random((BATCH, CONTEXT)) < 0.7).astype(np.float32)}
  if isolated:
    begins = rng.random((BATCH, CONTEXT)) < 0.15
    begins[:, 0] = True
    here = np.arange(CONTEXT, dtype=np.int32)
    rows |= {'segments': np.cumsum(begins, axis=1, dtype=np.int32),
             'positions': here - np.maximum.accumulate(np.where(begins, here, 0), axis=1)}
  return rows


def prepare(config: Config) -> Callable[[int], np.ndarray]:
  """A function from the number of some data to loss, gradient norm and targets of every step on it."""
  import jax

  from gptjax.model import model_of
  from gptjax.sharding import check_sizes, make_mesh, put_rows
  from gptjax.training import initializer, learning_rates, make_objective, make_optimizer, train_step
  with jax.set_mesh(mesh := make_mesh(config.mesh)):
    check_sizes(config, mesh)
    model, optimizer = model_of(config), make_optimizer(config.optimizer)
    initial = initializer(model, optimizer, config.zero_stage, mesh, 0)
    step = train_step(model, make_objective(config), optimizer, learning_rates(config.optimizer, steps=100, warmup=2, decay=0),
                      zero_stage=config.zero_stage, mesh=mesh, microbatches=config.microbatches, seed=0, pipeline=config.pipeline)

  def follow(data: int) -> np.ndarray:
    with jax.set_mesh(mesh):
      state, figures = initial(), []
      decided = {name: DECIDED * value for name, value in state.trained.items() if name.endswith('router/kernel')}
      state = state._replace(trained={**state.trained, **decided})
      for number in range(_STEPS.value):
        rows = batch(BATCHES * data + number % BATCHES, config.data.isolate_documents)
        state, metrics = step(state, put_rows(mesh, rows, BATCH))
        figures.append([float(metrics[name]) for name in ('loss', 'grad_norm', 'targets')])
      jax.effects_barrier()
    return np.array(figures)
  return follow


def one_device(config: Config) -> tuple[int, np.ndarray]:
  """The first data on which no token is nearly as close to another expert as to its own, and what one device finds on it.

  The choice of experts jumps where two scores are equal but for rounding: there, one device differs from itself with and without scan.
  """
  import jax

  from gptjax.sharding import tensor_shard_map
  gaps: list[float] = []
  top_k = jax.lax.top_k

  def watched(scores, count):
    best = top_k(scores, count + 1)[0]
    def tell(gap):  # where all axes are manual
      jax.debug.callback(lambda gap: gaps.append(float(gap)), gap)
      return gap
    told = tensor_shard_map(tell, jax.P(), jax.P())((best[:, count - 1] - best[:, count]).min())
    return top_k(scores + 0 * told, count)

  jax.lax.top_k = watched
  try:
    follow = prepare(config)
    for data in itertools.count():
      gaps.clear()
      figures = follow(data)
      if min(gaps, default=1.0) > MARGIN:
        return data, figures
  finally:
    jax.lax.top_k = top_k
    jax.clear_caches()


def main(_) -> None:
  flags.FLAGS.cpu_devices = DEVICES
  start()
  import jax
  part, parts = map(int, _PART.value.split('/'))
  one: dict[tuple, tuple[int, np.ndarray]] = {}
  found: dict[str, dict[str, object]] = {}
  for layout in choose(_COUNT.value)[part::parts]:
    what = tuple(layout[name] for name in WHAT)
    plain = {name: values[0] for name, values in HOW.items()} | {'compute.scan': True}
    if what not in one:
      one[what] = one_device(config_of(layout | plain))
      print(f'data {one[what][0]} for {what}', file=sys.stderr)
    data, expected = one[what]
    name = ', '.join(f'{key.rpartition(".")[2]} {value}' for key, value in layout.items())
    try:
      figures = prepare(config_of(layout))(data)
      jax.clear_caches()
    except UserError as error:
      found[name] = {'error': str(error)}
    else:
      loss, norm, _ = np.abs(figures / expected - 1).max(axis=0)
      found[name] = {'loss': float(loss), 'norm': float(norm), 'muon': layout['optimizer.name'] == 'muon',
                     'same targets': bool((figures[:, 2] == expected[:, 2]).all())}
    print(f'{name}: {found[name]}', file=sys.stderr, flush=True)
  print(json.dumps(found))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
