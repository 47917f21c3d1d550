"""Bars of mixtures of experts: what a layer costs beside a dense one, how evenly experts are used, and what they bring."""

import json
import statistics
from pathlib import Path

from tests.acceptance.record import Result, bar, python, train

SEEDS, STEPS = 3, 700


@bar
def expert_layer(folder: Path) -> Result:
  figures = json.loads(python('tests.acceptance.expert_cost').stdout)
  return Result('a layer of 8 and of 64 experts on a CPU, forward and backward, with its router and losses: at most 1.5 times the '
                'CPU-seconds of a dense layer of the same active size, on one core',
                ', '.join(f'{experts} experts: {ratio:.2f}' for experts, ratio in figures.items()),
                max(figures.values()) <= 1.5, 'python -m tests.acceptance --only=expert_layer')


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
