"""Bars of sharding: the same run on any mesh at any stage, the bytes that ZeRO promises, the compiled program, and plans."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

from gptjax.config import ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig
from tests.acceptance.record import Result, bar, on_cpu, python

TOLERANCE = {'adamw': 1e-5, 'dropout': 1e-5, 'muon': 1e-4}


@bar
def stages(folder: Path) -> Result:
  worst = json.loads(python('tests.acceptance.stages', '--cpu_devices=16', f'--cache_dir={folder}').stdout)
  most = {case: max(found.items(), key=lambda item: item[1]) for case, found in worst.items()}
  return Result('8 devices; ZeRO 0 to 3 x meshes 8x1, 4x2, 2x4, 1x8 x accumulation 1 and 4 x scanned and unrolled, and 2 replicas of 8x1, '
                '4x2, 2x4 with 4 microbatches; 8 heads, 2 key heads, odd vocabulary and feed-forward: 10 losses and gradient norms within '
                '1e-5 of one device and one microbatch, with dropout too; Muon with dropout 1e-4',
                f'{sum(map(len, worst.values()))} runs; '
                + ', '.join(f'{case} {value:.1e} ({name})' for case, (name, value) in most.items()),
                set(most) == set(TOLERANCE) and all(value <= TOLERANCE[case] for case, (_, value) in most.items()),
                'python -m tests.acceptance.stages')


@bar
def exchanges(folder: Path) -> Result:
  found = {(one['stage'], one['microbatches']): one['sent']
           for one in json.loads(python('tests.acceptance.exchanges', '--cpu_devices=8', f'--cache_dir={folder}').stdout)}
  gradients = {case: sent.get('all-reduce', 0) + sent.get('reduce-scatter', 0) for case, sent in found.items()}
  once = all(1 <= gradients[stage, 1] <= 1.02 and gradients[stage, 1] == gradients[stage, 4] for stage in (0, 1))
  return Result('the step compiled for 8 CPU devices: at stages 0 and 1 the gradients that are exchanged are 1.00 to 1.02 times the '
                'parameters, the same for 1 and 4 microbatches; stage 0 sends nothing else, stage 1 the updated parameters once',
                '; '.join(f'stage {stage}, {microbatches} microbatches: '
                          + ', '.join(f'{kind} {count:.3f}' for kind, count in sent.items())
                          for (stage, microbatches), sent in found.items()),
                once and {*found[0, 1]} == {'all-reduce'} and found[1, 1]['all-gather'] <= 1 and len(found) == 8,
                'python -m tests.acceptance.exchanges')


@bar
def zero_bytes(folder: Path) -> Result:
  python('tools.zero_bytes', '--cpu_devices=8', f'--json={folder}/table.json', f'--picture={folder}/figure.png')
  table = json.loads((folder / 'table.json').read_text())
  off = [abs((row['parameters'] + row['gradients'] + row['optimizer']) / row['paper'] - 1) for row in table]
  held = '; '.join(f'stage {stage}: ' + ', '.join(f'{row["parameters"] + row["gradients"] + row["optimizer"]:.2f}' for row in table
                                                  if row['stage'] == stage) for stage in range(4))
  return Result('bytes per parameter on a device, float32 and Adam: 16, 8+8/d, 4+12/d, 16/d at d = 2, 4, 8 within 1 %',
                f'{held}; off by {max(off):.2%} at most', max(off) <= 0.01 and len(table) == 12 and (folder / 'figure.png').exists(),
                'python -m tools.zero_bytes --cpu_devices=8 --picture=FILE.png')


LARGE = Config(
  model=ModelConfig(layers=8, width=2048, heads=16, mlp_width=5632, vocab_size=32000, positions='rope', norm='rmsnorm', mlp='swiglu',
                    bias=False, tied=False),
  compute=ComputeConfig(scan=True, remat='full', dtype='bfloat16'),
  data=DataConfig(context=2048), mesh=MeshConfig(data=8, model=2), batch_size=64)
"""A model that is long to compile and short to read."""


@bar
def tpu_program(folder: Path) -> Result:
  from gptjax import planning
  from gptjax.model import abstract_model
  from gptjax.planning.program import compile_step
  from gptjax.sharding import abstract_mesh
  on_cpu()
  topology = planning.parse('v5p:2x2x4')
  figures, met = [], True
  for stage in range(4):
    config = dataclasses.replace(LARGE, zero_stage=stage)
    sizes = topology.mesh_sizes(config)
    found = planning.collectives(compile_step(config, topology).text, sizes)
    bytes_of = lambda group: sum(one.total for one in group if one.axes)
    sent, theory = bytes_of(found), bytes_of(planning.theoretical(config, sizes))
    data = [one for one in found if one.axes == ('data',)]
    large = [one for one in data if one.payload >= 1e6]
    kinds = sorted({(one.kind, one.dtype) for one in large})
    met &= abs(sent / theory - 1) <= 0.1
    if stage >= 2:
      met &= ('reduce-scatter', 'f32') in kinds and not any(kind == 'all-reduce' for kind, _ in kinds)
      met &= {dtype for kind, dtype in kinds if kind == 'all-gather'} == {'bf16'}
      met &= {dtype for kind, dtype in kinds if kind == 'reduce-scatter'} == {'f32'}
    figures.append(f'stage {stage}: {sent / 1e9:.3f} GB sent, theory {theory / 1e9:.3f} ({sent / theory - 1:+.1%}), over data '
                   + ', '.join(f'{kind} {dtype}' for kind, dtype in kinds))

  def sizes_at(layers: int) -> tuple[float, float, float]:
    config = dataclasses.replace(LARGE, zero_stage=3, model=dataclasses.replace(LARGE.model, layers=layers))
    dump = folder / f'{layers}-layers'
    compile_step(config, topology, {'xla_dump_to': str(dump), 'xla_dump_hlo_as_text': True})
    # What the compiler assigns to temporaries in the chip's main memory, of color 0, which is not told.
    assigned, = dump.glob('*after_optimizations-buffer-assignment.txt')
    temporaries, = re.findall(r'^allocation \d+: size (\d+), preallocated-temp', assigned.read_text(), re.MULTILINE)
    # A layer keeps its input, in the compute dtype, for the backward pass; its shard of the gradients is state by the paper's count.
    activations = layers * config.batch_size * config.data.context / config.mesh.data * config.model.width * 2
    model = abstract_model(config.model, config.compute, config.data.context)
    shardings = model.shardings(3, abstract_mesh(topology.mesh_sizes(config)))
    gradients = 4 * sum(math.prod(sharding.shard_shape(model.shapes[name].shape)) for name, sharding in shardings.items())
    return float(temporaries), activations, gradients

  at = [sizes_at(layers) for layers in (8, 16, 32)]
  for layers, small, large in zip((8, 16), at[:-1], at[1:], strict=True):
    grown, activations, gradients = (b - a for a, b in zip(small, large, strict=True))
    met &= abs(grown / (activations + gradients) - 1) <= 0.1
    figures.append(f'{layers} to {2 * layers} layers: temporaries {grown / 1e6:+.0f} MB, activations saved {activations / 1e6:.0f} and '
                   f'sharded gradients {gradients / 1e6:.0f} ({grown / (activations + gradients) - 1:+.1%})')
  return Result('the step compiled for v5p:2x2x4 (data 8, model 2): at stages 2 and 3 gradients leave by float32 '
                'reduce-scatter, parameters are gathered in bfloat16; bytes sent within 10 % of theory at each stage; stage 3 at L and 2L '
                'layers: temporaries, as the compiler assigns them, grow by saved activations and sharded gradients alone, within 10 %',
                '; '.join(figures), met, 'python -m tests.acceptance --only=tpu_program')


@bar
def plans(folder: Path) -> Result:
  figures, met = [], True
  for name, topology in (('llama_13b', 'v5p:4x4x4'), ('llama_7b', 'v5e:16x16'), ('llama_1b', 'v5e:4x4')):
    start = time.monotonic()
    python('gptjax.plan', f'--config=configs/{name}.py', f'--topology={topology}', f'--json={folder}/{name}.json',
           f'--picture={folder}/{name}.png')
    seconds = time.monotonic() - start
    plan = json.loads((folder / f'{name}.json').read_text())['plan']
    memory, mesh = plan['memory'], plan['settings']
    state = memory['parameters'] + memory['optimizer']
    off = state / (12 * plan['parameters'] / mesh['mesh.data'] / mesh['mesh.model']) - 1
    met &= seconds <= 90 and plan['fits'] and plan['compiled'] is not None and abs(off) <= 0.01
    figures.append(f'{name} on {topology}: {seconds:.0f} s, {"fits" if plan["fits"] else "does not fit"}, '
                   f'{plan["compiled"]["total"] / 2**30:.1f} of {plan["available"] / 2**30:.1f} GiB, state off by {off:.2%}')
  # As if libtpu were not installed: nothing that is imported may find it.
  hidden = folder / 'hidden'
  hidden.mkdir()
  (hidden / 'sitecustomize.py').write_text(
    'import importlib.util as u\nfind = u.find_spec\nu.find_spec = lambda name, *a: None if name == "libtpu" else find(name, *a)\n')
  bare = python('gptjax.plan', '--config=configs/llama_7b.py', '--topology=v5e:16x16', PYTHONPATH=str(hidden)).stdout
  met &= 'libtpu is not installed' in bare and 'requirements-tpu.txt' in bare and 'perfect overlap' in bare and 'fits, analytic' in bare
  return Result('plans of llama_13b, llama_7b and llama_1b, each compiled: within 90 s, fits, state bytes within 1 % of 12/d a parameter; '
                'without libtpu the analytic part, and what is missing',
                '; '.join(figures) + f'; without libtpu: {bare.strip().splitlines()[-1]}', met,
                'python -m gptjax.plan --config=configs/llama_13b.py --topology=v5p:4x4x4')


@bar
def plan_search(folder: Path) -> Result:
  from gptjax.config import flatten, load
  figures, met = [], True
  for name in ('llama_13b', 'llama_70b'):
    start = time.monotonic()
    python('gptjax.plan', f'--config=configs/{name}.py', '--topology=v5p:4x4x4', '--search', f'--json={folder}/{name}.json',
           f'--picture={folder}/{name}.png')
    seconds = time.monotonic() - start
    plan = json.loads((folder / f'{name}.json').read_text())['plan']
    recipe = flatten(load(f'configs/{name}.py'))
    carried = all(recipe[setting] == value for setting, value in plan['settings'].items())
    met &= seconds <= 120 and plan['fits'] and plan['compiled'] is not None and carried
    layout = ', '.join(f'{setting} {value}' for setting, value in plan['settings'].items() if value != 1)
    figures.append(f'{name}: {seconds:.0f} s; {layout}: {plan["compiled"]["total"] / 2**30:.1f} of {plan["available"] / 2**30:.1f} GiB, '
                   f'{"as" if carried else "not as"} in the recipe')
  return Result('plan --search for llama_13b and llama_70b on v5p:4x4x4: within 120 s, the layout that is found compiles and fits, and the '
                'recipe has it', '; '.join(figures), met,
                'python -m gptjax.plan --config=configs/llama_13b.py --topology=v5p:4x4x4 --search')


@bar
def logits_memory(folder: Path) -> Result:
  done = subprocess.run([sys.executable, '-m', 'pytest', '-q', 'tests/model/test_loss.py', '-k', 'little_memory', '-s'],
                        capture_output=True, text=True)
  shares = re.findall(r'share of the logits: ([\d.]+)', done.stdout)
  return Result('8,192 tokens, 131,072 ids, float32, one device: temporaries of the loss and its gradient, less the head\'s own gradient, '
                'below 10 % of the logits', ', '.join(f'{float(share):.1%}' for share in shares) + ' (head on its own, tied)',
                done.returncode == 0 and len(shares) == 2 and max(map(float, shares)) < 0.1, 'pytest tests/model/test_loss.py')


@bar
def bad_mesh(folder: Path) -> Result:
  (folder / 'text.txt').write_text('some text of a few words\n' * 400)
  train = ['gptjax.train', '--config=configs/shakespeare_char_cpu.py', f'--config.data.source.path={folder}/text.txt',
           f'--workdir={folder}/run', f'--cache_dir={folder}/cache', '--cpu_devices=8']
  plan = ['gptjax.plan', '--config=configs/llama_7b.py']
  cases = {
    'mesh and devices': (train + ['--config.mesh.data=3', '--config.mesh.model=4'],
                         'mesh.data: 3, expected: -1 or at most 2 with 8 devices and mesh.model=4'),
    'model axis': (train + ['--config.mesh.model=3'], 'mesh.model: 3, expected: a divisor of the 8 devices: 1, 2, 4, 8'),
    'heads': (train + ['--config.mesh.model=8', '--config.batch_size=8'],
              'mesh.model: 8, expected: a divisor of model.heads=4 and of the 8 devices: 1, 2, 4'),
    'batch': (train + ['--config.batch_size=12'], 'batch_size: 12, expected: a multiple of mesh.data=8: 8 or 16'),
    'microbatches': (train + ['--config.batch_size=24', '--config.microbatches=2'],
                     'batch_size: 24, expected: a multiple of mesh.data=8 * microbatches=2: 16 or 32'),
    'too much unsharded': (train + ['--config.model.mlp_width=511', '--config.mesh.model=2', '--config.batch_size=16'],
                       'mesh.max_unsharded: 0.02, expected: at least 0.6'),
    'tokens': (train + ['--config.mesh.context=8', '--config.batch_size=8', '--config.data.context=72'],
               'data.context: 72, expected: a multiple of 2 * mesh.context=16: 64 or 80'),
    'stage': (train + ['--config.zero_stage=4'], 'zero_stage: 4, expected: 0, 1, 2 or 3'),
    'kernel': (train + ['--config.compute.attention=splash', '--config.batch_size=16'],
               "compute.attention: 'splash', expected: auto, blocks, xla on a cpu"),
    'topology': (plan + ['--topology=v5q:4x4'], "--topology: 'v5q:4x4', expected:"),
    'topology and mesh': (plan + ['--topology=v5e:4x4'], 'mesh.data: 256, expected: -1 or at most 16 with 16 devices'),
    'stray process': (train + ['--processes=2', '--process=2', '--coordinator=localhost:51790'], '--process: 2, expected:'),
  }
  wrong = []
  for name, (arguments, told) in cases.items():
    done = subprocess.run([sys.executable, '-m', *arguments], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    print(f'{name}: {errors or done.stderr[-300:]}', file=sys.stderr)
    if done.returncode != 2 or len(errors) != 1 or told not in errors[0] or 'Traceback' in done.stderr or (folder / 'run').exists():
      wrong.append(name)
  return Result('mistakes of mesh, batch, topology and processes: one error line with numbers and nearest choice, exit 2, no workdir',
                f'{len(cases) - len(wrong)} of {len(cases)}: {", ".join(cases)}' + ''.join(f'; wrong: {one}' for one in wrong), not wrong,
                'python -m tests.acceptance --only=bad_mesh')
