"""The coordinate check of muP: how much activations change in the first steps, by width (arXiv:2203.03466, appendix D.1).

python -m experiments.learning_rate_transfer.coordinates --picture=FILE.png
"""

import dataclasses
import math

import numpy as np
from absl import flags

from gptjax import config as configs

_PICTURE = flags.DEFINE_string('picture', None, 'PNG file for a picture')
_SEEDS = flags.DEFINE_integer('seeds', 4, 'initial values to average over', lower_bound=1)

STEPS, RATE = 10, 0.004
ROWS, CONTEXT = 4, 64
"""of one batch, which every step sees again"""
KINDS = {'AdamW, standard': False, 'AdamW, muP': True}

Changes = dict[str, dict[int, np.ndarray]]
"""By activation and width, of each step: the mean over tokens, features and seeds of |x - x before the first step|."""


def measured(mup: bool, widths: tuple[int, ...], seeds: int) -> Changes:
  """The changes of all activations over the first steps, at the rate RATE from the first step on."""
  found: Changes = {}
  for width in widths:
    runs = [_trained(mup, width, seed) for seed in range(seeds)]
    for name in NAMES:
      found.setdefault(name, {})[width] = np.mean([[step[name] for step in run] for run in runs], 0)
  return found


NAMES = ('embedding', *(f'{part} {layer}' for layer in (1, 2) for part in ('scores', 'attention', 'MLP')), 'logits')


def _trained(mup: bool, width: int, seed: int) -> list[dict[str, float]]:
  """The change of each activation by name, after each step."""
  import jax
  import jax.numpy as jnp

  from experiments.learning_rate_transfer.sweep import BASE, HEAD
  from gptjax.config import ComputeConfig, MeshConfig, OptimizerConfig
  from gptjax.model import abstract_model
  from gptjax.sharding import make_mesh
  from gptjax.training import learning_rates, make_optimizer, next_token, train_step, initializer

  model = dataclasses.replace(configs.load('configs/experiment.py').model, vocab_size=256, width=width, heads=width // HEAD,
                              mlp_width=width * 11 // 4, qk_norm='none', tied=False, mup_base=BASE if mup else 0)
  settings = OptimizerConfig(peak_lr=RATE, schedule='constant')
  optimizer, rates = make_optimizer(settings, model.width_ratio), learning_rates(settings, steps=STEPS, warmup=0, decay=0)
  text = np.frombuffer(configs.shipped('LICENSE').read_bytes()[:ROWS * CONTEXT + 1], np.uint8).astype(np.int32)
  batch = {'tokens': text[:-1].reshape(ROWS, CONTEXT), 'targets': text[1:].reshape(ROWS, CONTEXT),
           'positions': np.tile(np.arange(CONTEXT, dtype=np.int32), (ROWS, 1)), 'segments': np.zeros((ROWS, CONTEXT), np.int32),
           'mask': np.ones((ROWS, CONTEXT), np.float32)}
  mesh = make_mesh(MeshConfig(data=1))
  with jax.set_mesh(mesh):
    described = abstract_model(model, ComputeConfig(), CONTEXT)
    state = initializer(described, optimizer, 0, mesh, seed)()
    step = train_step(described, next_token(), optimizer, rates, zero_stage=0, mesh=mesh, microbatches=1, seed=0)
    read = jax.jit(lambda parameters: activations(described.merge(parameters), jnp.asarray(batch['tokens'])))
    first, changes = read(state.parameters), []
    for _ in range(STEPS):
      state, _ = step(state, batch)
      changes.append({name: float(jnp.abs(x - first[name]).mean()) for name, x in read(state.parameters).items()})
  return changes


def activations(model, tokens):
  """What each part of a Transformer hands on for tokens [B, T], by name; `scores` are products of queries and keys before RoPE."""
  import jax.numpy as jnp

  from gptjax.model.attention import positions_of
  positions = positions_of({'tokens': tokens})
  x = model.embed(tokens, positions, None)
  found = {'embedding': x}
  for number, block in enumerate(model.blocks, 1):
    y = block.attention_norm(x)
    q, k = (part(y).reshape(*tokens.shape, model.config.heads, -1) for part in (block.attention.q, block.attention.k))
    found[f'scores {number}'] = jnp.einsum('bthc,bshc->bhts', q, k) / math.sqrt(model.config.head_width)
    found[f'attention {number}'], _ = block.attention(y, number - 1, positions, None, None, None)
    x = x + found[f'attention {number}']
    found[f'MLP {number}'] = block.mlp(block.mlp_norm(x), None)
    x = x + found[f'MLP {number}']
  return found | {'logits': model.head.logits(model.norm(x))}


def spread(change: dict[int, np.ndarray], step: int = STEPS) -> float:
  """The largest relative distance of a width's change after some steps from the mean of all widths."""
  values = np.array([one[step - 1] for one in change.values()])
  return float(np.abs(values / values.mean() - 1).max())


def described(found: dict[str, Changes]) -> str:
  """A table in Markdown: the changes after the last step by width, and their spread."""
  from experiments.runs import table
  widths = list(next(iter(found.values()))['logits'])
  return table(['training', 'activation', *(f'width {width}' for width in widths), 'largest distance from the mean'], [
    [kind, name, *(f'{one[-1]:.3g}' for one in change.values()), f'{spread(change):.0%}']
    for kind, changes in found.items() for name, change in changes.items()])


def draw(found: dict[str, Changes], path) -> None:
  """Writes a PNG: the change of every activation after the last step by width."""
  from matplotlib.figure import Figure

  from gptjax.files import save_figure
  figure = Figure(figsize=(9, 3.8), layout='constrained')
  for axes, (kind, changes) in zip(figure.subplots(1, 2, sharey=True), found.items()):
    for name, change in changes.items():
      axes.plot(list(change), [one[-1] for one in change.values()], 'o-', markersize=3, linewidth=1, label=name)
    axes.set(xscale='log', yscale='log', xlabel='width', title=kind, xticks=list(change), xticklabels=list(map(str, change)))
    axes.minorticks_off()
    axes.spines[['top', 'right']].set_visible(False)
  figure.axes[0].set_ylabel(f'mean |change| after {STEPS} steps')
  figure.axes[1].legend(fontsize=8, frameon=False, loc='upper left', bbox_to_anchor=(1, 1))
  save_figure(figure, path, dpi=100)


def main(_: object) -> None:
  import jax
  jax.config.update('jax_platforms', 'cpu')
  from experiments.learning_rate_transfer.sweep import WIDTHS
  from gptjax.files import writable
  if _PICTURE.value and not _PICTURE.value.endswith('.png'):
    raise configs.UserError('--picture', _PICTURE.value, 'a file that ends in .png')
  picture = writable(_PICTURE.value, '--picture') if _PICTURE.value else None
  found = {kind: measured(mup, WIDTHS, _SEEDS.value) for kind, mup in KINDS.items()}
  print(described(found))
  if picture:
    draw(found, picture)


if __name__ == '__main__':
  configs.run(main, needs_config=False)
