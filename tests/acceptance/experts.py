"""Bars of mixtures of experts: what a layer costs beside a dense one, how evenly experts are used, and what they bring."""

import statistics
import time
from pathlib import Path

from tests.acceptance.record import Result, bar, train

TOKENS, WIDTH, FEATURES, CHOICES = 4096, 512, 2048, {8: 2, 64: 8}
"""Tokens of a step, width and active hidden features, in OLMoE's proportion, and the experts per token of so many experts."""
SEEDS, STEPS = 3, 700


@bar
def expert_layer(folder: Path) -> Result:
  figures = {experts: _ratio(experts, chosen) for experts, chosen in CHOICES.items()}
  return Result('a layer of 8 and of 64 experts on a CPU, forward and backward, with its router and losses: at most 1.5 times the CPU-seconds '
                'of a dense layer of the same active size',
                ', '.join(f'{experts} experts, {CHOICES[experts]} per token: {ratio:.2f}' for experts, ratio in figures.items()),
                max(figures.values()) <= 1.5, 'python -m tests.acceptance --only=expert_layer')


def _ratio(experts: int, chosen: int) -> float:
  """CPU-seconds of a layer of experts relative to those of a dense one."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from gptjax.config import ComputeConfig, MeshConfig, ModelConfig, RouterConfig
  from gptjax.model import abstract_model
  from gptjax.sharding import make_mesh
  jax.config.update('jax_platforms', 'cpu')
  plain = ModelConfig(layers=1, width=WIDTH, mlp_width=FEATURES, mlp='swiglu', bias=False, vocab_size=256)
  mixture = ModelConfig(layers=1, width=WIDTH, mlp='swiglu', bias=False, vocab_size=256, experts=experts, experts_per_token=chosen,
                        expert_width=FEATURES // chosen, router=RouterConfig(balance_loss=0.01, z_loss=0.001))

  def gradient(config, devices):
    model = abstract_model(config, ComputeConfig(), 256)
    parameters = model.initialize(jax.random.key(0), model.shardings(0, devices))

    @jax.jit
    def run(parameters, x, dy):
      def loss(parameters, x):
        layer = model.merge(parameters).blocks[0].mlp
        y, sums = layer(x, 0, jnp.ones((TOKENS // 256, 256)), None) if config.experts else (layer(x, None), {'loss': 0.0})
        return (y * dy).sum() + sums['loss']
      return jax.grad(loss, (0, 1))(parameters, x)
    return run, parameters

  with jax.set_mesh(devices := make_mesh(MeshConfig(1, 1), jax.devices()[:1])):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(TOKENS, WIDTH)), jnp.float32) for _ in range(2))
    runs = [gradient(config, devices) for config in (plain, mixture)]
    best = [float('inf')] * 2
    for _ in range(6):  # in turns, so that both see the same machine
      for index, (run, parameters) in enumerate(runs):
        begin = time.process_time()
        jax.block_until_ready(run(parameters, x, dy))
        best[index] = min(best[index], time.process_time() - begin)
  return best[1] / best[0]


def _trained(config: str, folder: Path, *flags: str) -> list[dict]:
  return train(config, folder, '--config.eval.sample_tokens=0', f'--config.steps={STEPS}', *flags)


def imbalance(lines: list[dict]) -> float:
  """The largest load of an expert relative to the mean of its layer, on average over the steps of the last tenth."""
  steps = [line for line in lines if 'load_imbalance' in line and line['step'] > 0.9 * lines[-1]['step']]
  layers = [[[line['expert_load'][layer][expert] for line in steps] for expert in range(len(load))]
            for layer, load in enumerate(steps[0]['expert_load'])]
  return max(statistics.mean(of_expert) for layer in layers for of_expert in layer)


@bar
def expert_balance(folder: Path) -> Result:
  ways = {'bias': (), 'loss': ('--config.model.router.bias=False', '--config.model.router.balance_loss=0.01')}
  found = {name: imbalance(_trained('moe_small', folder / name, *flags)) for name, flags in ways.items()}
  return Result('balanced by a bias or by a loss: over the last tenth of a run the busiest expert gets at most 1.5 times the mean',
                ', '.join(f'{name}: {value:.2f}' for name, value in found.items()), max(found.values()) <= 1.5,
                'python -m gptjax.train --config=configs/moe_small.py')


@bar
def experts_against_dense(folder: Path) -> Result:
  found = {name: [_last_score(_trained(name, folder / f'{name}-{seed}', f'--config.seed={seed}')) for seed in range(SEEDS)]
           for name in ('default', 'moe_small')}
  words = ', '.join(f'{name}: {statistics.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})' for name, values in found.items())
  return Result('8 experts, of which a token uses 2, against a dense model of the same active parameters: bits per byte on the default '
                'corpus after the same steps, 3 seeds', words, True, 'python -m gptjax.train --config=configs/moe_small.py --config.seed=0')


def _last_score(lines: list[dict]) -> float:
  return [line['eval/valid/bits_per_byte'] for line in lines if 'eval/valid/bits_per_byte' in line][-1]
