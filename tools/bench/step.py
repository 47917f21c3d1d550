"""A training step beside transformers' GPT-2 in torch: float32, the same batches, AdamW and clipping included."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import numpy as np

from gptjax import config as configs
from gptjax import heap
from .contest import OURS, Contest


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
  """steps per round"""
  bar: float


SHAPES = {
  'large': Shape(12, 768, 12, 256, 4, 50304, 1, 0.93),
  'medium': Shape(6, 384, 6, 256, 16, 65, 1, 1.0),
  'small': Shape(4, 128, 4, 64, 12, 65, 20, 1.0),
}
MOST_FAULTS = 1000
"""page faults per step: a temporary buffer that is not kept causes 250 per MiB"""


def batches(shape: Shape) -> Iterator[np.ndarray]:
  """The same random rows [B, T + 1] for every implementation."""
  rng = np.random.default_rng(0)
  while True:
    yield rng.integers(0, shape.vocab, (shape.batch, shape.context + 1), dtype=np.int32)


def our_step(shape: Shape) -> Callable[[np.ndarray], float]:
  """gptjax: the step that gptjax.train runs."""
  heap.keep_freed_memory()  # as gptjax.start does
  import jax

  from gptjax import model, sharding, training

  jax.set_mesh(mesh := sharding.make_mesh(configs.MeshConfig()))
  config = configs.ModelConfig(layers=shape.layers, width=shape.width, heads=shape.heads, vocab_size=shape.vocab, vocab_multiple=1)
  described = model.abstract_model(config, configs.ComputeConfig(), shape.context)
  optimizer_config = configs.OptimizerConfig(peak_lr=1e-4, schedule='constant', warmup=0)
  durations = {'steps': 1000, 'warmup': 0, 'decay': 0}
  optimizer = training.make_optimizer(optimizer_config)
  step = training.train_step(described, training.next_token(), optimizer,
                             training.learning_rates(optimizer_config, **durations), zero_stage=0, mesh=mesh, microbatches=1, seed=0)
  state = training.initializer(described, optimizer, 0, mesh, 0)()
  mask = np.ones((shape.batch, shape.context), np.float32)

  def run(rows):
    nonlocal state
    batch = {'tokens': rows[:, :-1], 'targets': rows[:, 1:], 'mask': mask}
    state, metrics = step(state, sharding.put_rows(mesh, batch, shape.batch))
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


def contest(shape: Shape) -> Contest:
  """A round is some steps on new batches."""
  def rounds_of(make):
    step, data = make(), batches(shape)
    return lambda: [step(next(data)) for _ in range(shape.steps)]

  makers = {OURS: lambda: our_step(shape), 'torch eager': lambda: torch_step(shape, compiled=False),
            'torch compiled': lambda: torch_step(shape, compiled=True)}
  return Contest(f'{shape.layers} / {shape.width} / {shape.context} / {shape.batch} / {shape.vocab}',
                 {name: functools.partial(rounds_of, make) for name, make in makers.items()}, shape.steps, shape.bar, MOST_FAULTS)
