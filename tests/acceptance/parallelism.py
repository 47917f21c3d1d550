"""Bars of parallelism over layers, tokens and experts: the same run in every layout, and what the compiled programs need."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np

from gptjax.model import unstack_layers
from tests.acceptance.disturbed import figures, recipe
from tests.acceptance.kept_state import kept, same
from tests.acceptance.record import Result, bar, on_cpu, python, several
from tests.acceptance.sharding import TOLERANCE


@bar
def layouts(folder: Path) -> Result:
  found = json.loads(python('tests.acceptance.layouts', '--cpu_devices=8', f'--cache_dir={folder}').stdout)
  refused = [name for name, one in found.items() if 'error' in one]
  run = {name: one for name, one in found.items() if name not in refused}
  off = [name for name, one in run.items() if not (one['same targets'] and one['norm'] <= 1e-4
                                                   and one['loss'] <= TOLERANCE['muon' if one['muon'] else 'adamw'])]
  most = {kind: max((one[kind] for one in run.values()), default=0.0) for kind in ('loss', 'norm')}
  return Result('at least 60 layouts of 8 devices in which every pair of choices occurs (stages, schedules, chunks, data, replicas, model, '
                'context, exchange, experts, ZeRO, microbatches, remat, scan; dense and experts, tied, dropout, documents, optimizer): 20 '
                'losses within 1e-5 of one device, Muon 1e-4, gradient norms 1e-4, equal targets',
                f'{len(found)} layouts, losses {most["loss"]:.1e}, norms {most["norm"]:.1e}; refused {len(refused)}; off: '
                + ('; '.join(off[:3]) or 'none'), len(run) >= 60 and not refused and not off, 'python -m tests.acceptance.layouts')


ALONE, SAVED, END = 'one device', 2, 4
"""A layout, the step of the checkpoint from which runs go on in others, and their last step."""
PLACES: dict[str, tuple[int, int, dict[str, object]]] = {
  ALONE: (1, 1, {}), 'data 8': (1, 8, {'mesh.data': 8, 'zero_stage': 3}), 'model 4': (1, 8, {'mesh.model': 4, 'zero_stage': 2}),
  'pipe 4': (1, 8, {'mesh.pipe': 4, 'pipeline.schedule': 'ZBH1', 'microbatches': 4, 'zero_stage': 1}),
  'context 4': (1, 8, {'mesh.context': 4, 'compute.scan': True}), 'expert 4': (1, 8, {'mesh.expert': 4, 'zero_stage': 3}),
  'pipe 4 in 4 processes': (4, 2, {'mesh.pipe': 4, 'microbatches': 8, 'zero_stage': 2}),
  'pipe 2, context 2, expert 2 in 4 processes': (4, 2, {
    'mesh.pipe': 2, 'mesh.context': 2, 'mesh.expert': 2, 'pipeline.schedule': 'Interleaved1F1B', 'pipeline.chunks': 2, 'microbatches': 4})}
"""Processes, devices of each, and settings, for every axis and for several in one run; the layers do not divide over the stages."""


@bar
def parallel_restarts(folder: Path) -> Result:
  model = {'layers': 5, 'width': 32, 'heads': 4, 'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'experts': 4,
           'experts_per_token': 2, 'expert_width': 24, 'router.balance_loss': 0.01}
  flags = recipe(folder, *(f'--config.model.{name}={value}' for name, value in model.items()), '--config.batch_size=64',
                 '--config.data.context=16', '--config.eval.every=0', '--config.mesh.max_unsharded=1',
                 f'--config.checkpoint.every={SAVED}', f'--stop_at={END}')

  def train(workdir: Path, layout: str) -> tuple[list[float], int]:
    processes, devices, settings = PLACES[layout]
    args = ['tests.acceptance.kept_state', *flags, f'--workdir={workdir}']
    args += [f'--config.{name}={value}' for name, value in settings.items()]
    if processes == 1:
      python(*args, f'--cpu_devices={devices}')
    else:
      several(processes, devices, *args)
    return [line['loss'] for line in figures(workdir) if 'loss' in line], processes

  off = lambda losses: max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))
  expected: list[float] = []
  worst, wrong, arrays = [0.0, 0.0], [], 0
  for source in PLACES:
    here = folder / source.replace(' ', '-')
    losses, processes = train(here, source)
    expected = expected or losses
    worst[0] = max(worst[0], off(losses))
    saved = kept(here, f'saved-{SAVED}', processes)
    arrays = len(saved)
    for target in PLACES:
      if target == source:
        continue
      shutil.copytree(here, there := folder / 'there', ignore=shutil.ignore_patterns('*.npz', str(END)))
      losses, processes = train(there, target)
      worst[1] = max(worst[1], off(losses))
      equal = same(*map(_by_layer, (kept(there, f'restored-{SAVED}', processes), saved)))
      print(f'{source} to {target}: losses {off(losses):.1e}, state {equal}', file=sys.stderr, flush=True)
      if not equal or off(losses) > 1e-5:
        wrong.append(f'{source} to {target}')
      shutil.rmtree(there)
  count = len(PLACES) * (len(PLACES) - 1)
  return Result(f'a model with experts and dropout in {len(PLACES)} layouts ({", ".join(PLACES)}): losses within 1e-5 of one device; '
                'restarted from each in every other: the train state bit by bit what was saved, and the next losses within 1e-5',
                f'losses {worst[0]:.1e}; {count - len(wrong)} of {count} restarts: {arrays} arrays equal each, losses {worst[1]:.1e}'
                + ''.join(f'; wrong: {one}' for one in wrong), max(worst) <= 1e-5 and not wrong and arrays > 30,
                'python -m gptjax.train --workdir=DIR ..., again with another --config.mesh.*')


def _by_layer(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The arrays of a state, one per layer; the key of one is its path in the state, such as .trained['blocks/mlp/up/kernel']."""
  return unstack_layers({key.replace("['", '/').replace("']", ''): array for key, array in state.items()})


STAGES = {'mesh.pipe': 4, 'mesh.data': 4, 'mesh.model': 4, 'batch_size': 64, 'microbatches': 16, 'zero_stage': 1, 'compute.remat': 'none'}
"""The layout of the programs that are compared: one row per microbatch on a device."""


@bar
def pipeline_program(folder: Path) -> Result:
  from gptjax import planning
  from gptjax.config import load, override
  from gptjax.planning.program import TooLarge, compile_step
  from gptjax.planning.volumes import schedule_of
  on_cpu()
  topology = planning.parse('v5p:4x4x4')

  def compiled(schedule: str) -> tuple[float, float]:
    """GiB of temporaries, and multiplications and additions of a step on a device in the products of the program."""
    config = override(load('configs/llama_13b.py'), STAGES | {'pipeline.schedule': schedule})
    try:
      program = compile_step(config, topology)
    except TooLarge as error:  # it tells what it would need in all, of which the state is a part
      used, = re.findall(r'Used ([\d.]+)G', str(error))
      return float(used), float('nan')
    ticks = schedule_of(config, topology.mesh_sizes(config)).ticks
    return program.temporaries / 2**30, products(program.text, config.microbatches / ticks)

  found = {schedule: compiled(schedule) for schedule in ('1F1B', 'ZBH1', 'GPipe')}
  (one, flops), (zero, more), (all_kept, _) = found.values()
  return Result('13B compiled for v5p:4x4x4, pipe 4 x data 4 x model 4, 16 microbatches, ZeRO 1, no remat: temporaries of 1F1B at most 0.6 '
                'times those of GPipe, of ZBH1 at most 1.1 times those of 1F1B; operations in the products of ZBH1 within 2 % of 1F1B\'s',
                ', '.join(f'{schedule} {gib:.2f} GiB' for schedule, (gib, _) in found.items())
                + f': {one / all_kept:.2f}, {zero / one:.2f}; {flops:.4e} and {more:.4e} operations ({more / flops - 1:+.2%})',
                one <= 0.6 * all_kept and zero <= 1.1 * one and abs(more / flops - 1) <= 0.02,
                'python -m tests.acceptance --only=pipeline_program')


_PRODUCT = re.compile(r'(%[\w.-]+) = .* convolution\((?:\w+\[[^%]*)?%[\w.-]+, (?:\w+\[[^%]*)?(%[\w.-]+)\).*dim_labels=\w+_(\w+)->')


def products(text: str, operation: float) -> float:
  """Multiplications and additions in the matrix products of a compiled program for TPUs, which writes them as convolutions.

  `operation`: share of the ticks at which a stage runs F, and as often B and W.
  """
  from gptjax.planning.collectives import executed
  shapes: dict[str, list[int]] = {}
  lines = list(executed(text, operation))
  for line, _ in lines:
    if match := re.match(r'\s+(?:ROOT )?(%[\w.-]+) = \w+\[([\d,]*)\]', line):
      shapes[match[1]] = [int(size) for size in match[2].split(',') if size]
  total = 0.0
  for line, trips in lines:
    if match := _PRODUCT.search(line):
      kernel, batch = shapes[match[2]], re.search(r'lhs_dilate=([\dx]+)', line)  # a batch of products: each meets one of the kernels
      taps = math.prod(map(int, batch[1].split('x'))) if batch else 1
      total += 2 * trips * math.prod(shapes[match[1]]) * math.prod(kernel) / kernel[match[3].index('o')] / taps
  return total


@bar
def context(folder: Path) -> Result:
  from gptjax import planning
  from gptjax.config import load, override
  from gptjax.planning.program import compile_step
  on_cpu()
  topology = planning.parse('v5p:2x2x2')
  recipe = load('configs/llama_1b_128k.py')
  over_rows = override(recipe, {'mesh.data': 8, 'mesh.context': 1, 'microbatches': 1})
  divided, alone = (planning.estimate(config, topology).compile() for config in (recipe, over_rows))
  sent, theory = (sum(one.total for one in found if one.kind == 'collective-permute') for found in (divided.found, divided.analytic))

  # What two more layers add to the temporaries, without gradients, over what a device would keep of a complete row, which does not fit.
  at = lambda config, layers: override(config, {'model.layers': layers, 'microbatches': 1, 'batch_size': 8 // config.mesh.context})
  expected = lambda config, layers: planning.analytic_memory(at(config, layers), topology.mesh_sizes(config))
  few, more = (compile_step(at(recipe, layers), topology).temporaries - expected(recipe, layers).gradients for layers in (2, 4))
  share = (more - few) / (expected(over_rows, 4).activations - expected(over_rows, 2).activations)
  return Result('Llama 1B at 131,072 tokens, remat dots, compiled for v5p:2x2x2: it fits with context 8 and does not with data 8; two more '
                'layers add an eighth of the activations of a row, within 10 %; the ring sends what theory says, within 5 %',
                f'{divided.needed / 2**30:.1f} of {divided.available / 2**30:.1f} GiB; with data 8: '
                f'{alone.refusal or f"{alone.needed / 2**30:.1f} GiB"}; activations {share:.4f}; '
                f'{sent / 1e9:.1f} GB sent ({sent / theory - 1:+.1%})',
                divided.fits and not alone.fits and abs(8 * share - 1) <= 0.1 and abs(sent / theory - 1) <= 0.05,
                'python -m tests.acceptance --only=context')
