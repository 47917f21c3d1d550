"""How much the activations of a model change in the first steps, by width: the coordinate check of muP (arXiv:2203.03466, appendix D.1)."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int
from matplotlib.figure import Figure

from experiments.learning_rate_transfer.sweep import BASE, HEAD
from experiments.runs import table
from gptjax import config as configs
from gptjax.config import ComputeConfig, MeshConfig, OptimizerConfig
from gptjax.files import save_figure
from gptjax.model import Transformer, abstract_model
from gptjax.model.attention import positions_of
from gptjax.model.layers import MLP
from gptjax.sharding import make_mesh
from gptjax.training import initializer, learning_rates, make_optimizer, next_token, train_step

STEPS, RATE = 10, 0.002
ROWS, CONTEXT = 4, 64
"""One batch, which every step sees again."""
KINDS = {'AdamW, standard': False, 'AdamW, muP': True}

NAMES = ('embedding', *(f'{part} {layer}' for layer in (1, 2) for part in ('scores', 'attention', 'MLP')), 'logits')

Changes = dict[str, dict[int, float]]
"""By activation and width: |x - x before the first step|, a mean over features, tokens, steps and seeds."""


def measured(mup: bool, widths: Sequence[int], seeds: int) -> Changes:
  """The changes of all activations in the first steps, at a constant rate."""
  found: Changes = {name: {} for name in NAMES}
  for width in widths:
    runs = _runs(mup, width, seeds)
    for name in NAMES:
      found[name][width] = float(np.mean([one[name] for one in runs]))
  return found


def _runs(mup: bool, width: int, seeds: int) -> list[dict[str, float]]:
  """The change of each activation by name, of each seed and step."""
  model = dataclasses.replace(configs.load('configs/experiment.py').model, vocab_size=256, width=width, heads=width // HEAD,
                              mlp_width=width * 11 // 4, qk_norm='none', tied=False, mup_base=BASE if mup else 0)
  settings = OptimizerConfig(peak_lr=RATE, schedule='constant')
  optimizer, rates = make_optimizer(settings, model.width_ratio), learning_rates(settings, steps=STEPS, warmup=0, decay=0)
  batch, found, mesh = _batch(), [], make_mesh(MeshConfig(data=1))
  with jax.set_mesh(mesh):
    described = abstract_model(model, ComputeConfig(), CONTEXT)
    fresh = initializer(described, optimizer, 0, mesh, 0)
    draw = jax.jit(lambda seed: described.initialize(jax.random.key(seed), described.shardings(0, mesh)))
    step = train_step(described, next_token(), optimizer, rates, zero_stage=0, mesh=mesh, microbatches=1, seed=0)
    read = jax.jit(lambda parameters: activations(described.merge(parameters), jnp.asarray(batch['tokens'])))
    for seed in range(seeds):
      state = fresh()._replace(trained=draw(seed))
      first = read(state.parameters)
      for _ in range(STEPS):
        state, _ = step(state, batch)
        found.append({name: float(jnp.abs(x - first[name]).mean()) for name, x in read(state.parameters).items()})
  return found


def _batch() -> dict[str, np.ndarray]:
  """The batch that all steps see: bytes of the license."""
  text = np.frombuffer(configs.shipped('LICENSE').read_bytes()[:ROWS * CONTEXT + 1], np.uint8).astype(np.int32)
  return {'tokens': text[:-1].reshape(ROWS, CONTEXT), 'targets': text[1:].reshape(ROWS, CONTEXT),
          'positions': np.tile(np.arange(CONTEXT, dtype=np.int32), (ROWS, 1)), 'segments': np.zeros((ROWS, CONTEXT), np.int32),
          'mask': np.ones((ROWS, CONTEXT), np.float32)}


def activations(model: Transformer, tokens: Int[Array, 'B T']) -> dict[str, Array]:
  """What each part of a Transformer hands on for tokens [B, T], by name; `scores` are products of queries and keys before RoPE."""
  positions = positions_of({'tokens': tokens})
  x = model.embed(tokens, positions, None)
  found = {'embedding': x}
  assert isinstance(model.blocks, nnx.List), 'layers are not stacked'
  for number, block in enumerate(model.blocks, 1):
    assert block.attention_norm is not None and block.mlp_norm is not None and isinstance(block.mlp, MLP), 'norms come first'
    y = block.attention_norm(x)
    q, k = (part(y).reshape(*tokens.shape, model.config.heads, -1) for part in (block.attention.q, block.attention.k))
    found[f'scores {number}'] = jnp.einsum('bthc,bshc->bhts', q, k) / math.sqrt(model.config.head_width)
    found[f'attention {number}'], _ = block.attention(y, number - 1, positions, None, None, None)
    x = x + found[f'attention {number}']
    found[f'MLP {number}'] = block.mlp(block.mlp_norm(x), None)
    x = x + found[f'MLP {number}']
  return found | {'logits': model.head.logits(model.norm(x))}


def spread(change: dict[int, float]) -> float:
  """The largest relative distance of a width from the mean of all widths."""
  values = np.array(list(change.values()))
  return float(np.abs(values / values.mean() - 1).max())


def described(found: dict[str, Changes]) -> str:
  """A table in Markdown: the changes by width, and their spread."""
  widths = list(next(iter(found.values()))['logits'])
  return table(['training', 'activation', *(f'width {width}' for width in widths), 'largest distance from the mean'], [
    [kind, name, *(f'{one:.3g}' for one in change.values()), f'{spread(change):.0%}']
    for kind, changes in found.items() for name, change in changes.items()])


def draw(found: dict[str, Changes], path: Path) -> None:
  """Writes a PNG: the change of every activation by width."""
  figure = Figure(figsize=(9, 3.8), layout='constrained')
  for axes, (kind, changes) in zip(figure.subplots(1, 2, sharey=True), found.items()):
    for name, change in changes.items():
      axes.plot(list(change), list(change.values()), 'o-', markersize=3, linewidth=1, label=name)
    axes.set(xscale='log', yscale='log', xlabel='width', title=kind, xticks=list(change), xticklabels=list(map(str, change)))
    axes.minorticks_off()
    axes.spines[['top', 'right']].set_visible(False)
  figure.axes[0].set_ylabel(f'mean |change| in {STEPS} steps')
  figure.axes[1].legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  save_figure(figure, path, dpi=100)
