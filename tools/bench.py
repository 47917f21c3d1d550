"""Times a training step beside transformers' GPT-2 in torch: python -m tools.bench

Both run float32 on this machine's CPU, on the same batches, with AdamW and clipping: ours, torch eager and torch compiled,
each in a process of its own that waits while another is timed. Rounds alternate, so a noisy machine slows all of them, and
what is told is the median over rounds of the ratio to the faster torch. Needs requirements-parity.txt.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
from absl import flags

from gptjax import config as configs

_ROUNDS = flags.DEFINE_integer('rounds', 7, 'alternating rounds a shape', lower_bound=1)
_SHAPES = flags.DEFINE_list('shapes', ['large', 'medium', 'small'], 'shapes to time: large, medium, small')
_OUT = flags.DEFINE_string('out', '', 'Markdown file to write the table to; empty: only print it')
_WORKER = flags.DEFINE_string('worker', '', 'internal: the implementation that this process times')


@dataclasses.dataclass(frozen=True)
class Shape:
  """A model and a batch."""

  layers: int
  width: int
  heads: int
  context: int
  batch: int
  vocab: int
  steps: int
  """steps a round"""
  bar: float
  """torch's time over ours that the project promises"""


SHAPES = {
  'large': Shape(12, 768, 12, 256, 4, 50304, 1, 1.0),
  'medium': Shape(6, 384, 6, 256, 16, 65, 2, 0.75),
  'small': Shape(4, 128, 4, 64, 12, 65, 50, 0.75),
}


def batches(shape: Shape) -> Iterator[np.ndarray]:
  """The same random rows [B, T + 1] for every implementation."""
  rng = np.random.default_rng(0)
  while True:
    yield rng.integers(0, shape.vocab, (shape.batch, shape.context + 1), dtype=np.int32)


def our_step(shape: Shape) -> Callable[[np.ndarray], float]:
  """gptjax: the step that gptjax.train runs."""
  import jax

  from gptjax import model, sharding, training

  jax.set_mesh(mesh := sharding.make_mesh(configs.MeshConfig()))
  plan = model.blueprint(configs.ModelConfig(layers=shape.layers, width=shape.width, heads=shape.heads,
                                             vocab_size=shape.vocab, vocab_multiple=1), shape.context)
  optimizer_config = configs.OptimizerConfig(peak_lr=1e-4, schedule='constant', warmup=0)
  durations = {'steps': 1000, 'warmup': 0, 'decay': 0}
  optimizer = training.make_optimizer(optimizer_config, **durations)
  step = training.train_step(plan, training.next_token(), optimizer,
                             training.schedule(optimizer_config, 1e-4, **durations), zero_stage=0, mesh=mesh, microbatches=1, seed=0)
  state = training.initializer(plan, optimizer, 0, mesh, 0)()
  mask = np.ones((shape.batch, shape.context), np.float32)

  def run(rows):
    nonlocal state
    batch = {'tokens': rows[:, :-1], 'targets': rows[:, 1:], 'mask': mask}
    state, metrics = step(state, sharding.place(mesh, batch, 'batch', None))
    return float(metrics['loss'])

  return run


def torch_step(shape: Shape, compiled: bool) -> Callable[[np.ndarray], float]:
  """transformers' GPT-2 with torch's fused AdamW."""
  import torch
  from transformers import GPT2Config, GPT2LMHeadModel

  torch.set_num_threads(os.cpu_count())
  torch.manual_seed(0)
  net = GPT2LMHeadModel(GPT2Config(
    vocab_size=shape.vocab, n_positions=shape.context, n_embd=shape.width, n_layer=shape.layers, n_head=shape.heads,
    resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False, bos_token_id=None, eos_token_id=None)).train()
  matrices = [p for p in net.parameters() if p.ndim > 1]
  others = [p for p in net.parameters() if p.ndim <= 1]
  adamw = torch.optim.AdamW([{'params': matrices, 'weight_decay': 0.1}, {'params': others, 'weight_decay': 0.0}],
                            lr=1e-4, betas=(0.9, 0.95), fused=True)

  def loss_of(rows):
    logits = net(rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.reshape(-1, shape.vocab), rows[:, 1:].reshape(-1))

  forward = torch.compile(loss_of) if compiled else loss_of

  def run(rows):
    loss = forward(torch.from_numpy(rows).long())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    return loss.item()

  return run


IMPLEMENTATIONS = {
  'gptjax': our_step,
  'torch eager': lambda shape: torch_step(shape, compiled=False),
  'torch compiled': lambda shape: torch_step(shape, compiled=True),
}


def work(implementation: str, shape: Shape) -> None:
  """A worker: warms up, then times a round for every line on stdin, and answers with JSON."""
  data = batches(shape)
  run = IMPLEMENTATIONS[implementation](shape)
  for _ in range(3):
    loss = run(next(data))
  print(json.dumps({'loss': loss}), flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    for _ in range(shape.steps):
      run(next(data))
    print(json.dumps({'seconds': (time.perf_counter() - start) / shape.steps}), flush=True)


@contextlib.contextmanager
def worker(implementation: str, name: str) -> Iterator[Callable[[], float]]:
  """A warm worker process; calling it times a round, in seconds a step."""
  command = [sys.executable, '-m', 'tools.bench', f'--worker={implementation}', f'--shapes={name}']
  # Idle torch threads spin by default and would slow down whoever is being timed.
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'OMP_WAIT_POLICY': 'PASSIVE', 'KMP_BLOCKTIME': '0'}
  process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                             env=environment)

  def answer() -> dict:
    while line := process.stdout.readline():
      if line.startswith('{'):
        return json.loads(line)
    raise RuntimeError(f'{implementation} ended with status {process.wait()} on {name}')

  def round_() -> float:
    process.stdin.write('go\n')
    process.stdin.flush()
    return answer()['seconds']

  try:
    answer()
    yield round_
  finally:
    process.stdin.close()
    process.wait()


def compare(name: str, rounds: int) -> dict:
  """Times of a step by implementation, and the ratio of the faster torch's to ours."""
  with contextlib.ExitStack() as stack:
    rounds_of = {implementation: stack.enter_context(worker(implementation, name)) for implementation in IMPLEMENTATIONS}
    times = {implementation: [] for implementation in IMPLEMENTATIONS}
    for _ in range(rounds):
      for implementation, timed in rounds_of.items():
        times[implementation].append(timed())
  medians = {implementation: statistics.median(seconds) for implementation, seconds in times.items()}
  fastest = min(('torch eager', 'torch compiled'), key=medians.__getitem__)
  ratios = [theirs / ours for theirs, ours in zip(times[fastest], times['gptjax'])]
  return {'shape': name, 'seconds': medians, 'fastest torch': fastest, 'ratio': statistics.median(ratios),
          'lowest': min(ratios), 'highest': max(ratios), 'bar': SHAPES[name].bar}


def table(results: list[dict]) -> str:
  """The results as Markdown."""
  lines = ['| layers / width / context / batch / vocabulary | gptjax | torch eager | torch compiled | '
           'torch over gptjax (lowest to highest round) | bar |', '| --- | --- | --- | --- | --- | --- |']
  for result in results:
    shape = SHAPES[result['shape']]
    size = f'{shape.layers} / {shape.width} / {shape.context} / {shape.batch} / {shape.vocab}'
    milliseconds = ' | '.join(f'{seconds * 1e3:,.1f} ms' for seconds in result['seconds'].values())
    lines.append(f'| {size} | {milliseconds} | {result["ratio"]:.2f} ({result["lowest"]:.2f} to {result["highest"]:.2f}) | '
                 f'at least {result["bar"]:.2f} |')
  return '\n'.join(lines)


def page(results: list[dict], rounds: int) -> str:
  """docs/bench.md."""
  return ('# Speed of a training step\n\nfloat32 on CPU, AdamW and clipping included, the same batches; medians over '
          f'{rounds} alternating rounds.\n`make bench` wrote this.\n\n{table(results)}\n\n{datetime.date.today()}, {machine()}\n')


def machine() -> str:
  """Processor, cores and versions, for beside a figure."""
  names = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if 'model name' in line]
  installed = {d.name for d in metadata.distributions()}
  versions = ', '.join(f'{name} {metadata.version(name)}' for name in ('jax', 'torch', 'transformers') if name in installed)
  return f'{os.cpu_count()} cores of {names[0] if names else "unknown"}, {versions}'


def main(_) -> None:
  for name in _SHAPES.value:
    if name not in SHAPES:
      raise configs.UserError('--shapes', name, ', '.join(SHAPES), SHAPES)
  if _WORKER.value:
    work(_WORKER.value, SHAPES[_SHAPES.value[0]])
    return
  for package in ('torch', 'transformers'):
    try:
      metadata.version(package)
    except metadata.PackageNotFoundError:
      raise configs.UserError(package, None, 'pip install -r requirements-parity.txt') from None
  Path(_OUT.value or '.').parent.mkdir(exist_ok=True)  # not after minutes of timing
  results = []
  for name in _SHAPES.value:
    results.append(compare(name, _ROUNDS.value))
    print(json.dumps(results[-1]), flush=True)
  print(table(results), machine(), sep='\n\n')
  if _OUT.value:
    Path(_OUT.value).write_text(page(results, _ROUNDS.value))


if __name__ == '__main__':
  configs.run(main, needs_config=False)
