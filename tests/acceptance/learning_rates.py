"""Bars of muP: the best learning rate stays where it is as the width grows, and so do the changes of activations."""

from pathlib import Path

from experiments.learning_rate_transfer import activations, rates
from experiments.learning_rate_transfer.sweep import WIDTHS
from experiments.runs import read
from tests.acceptance.record import Result, bar, on_cpu, python

_SEEDS = 8


@bar
def learning_rate_transfer(folder: Path) -> Result:
  python('gptjax.sweep', '--sweep=experiments/learning_rate_transfer/sweep.py', f'--out={folder}/sweep', '--workers=2')
  found = rates.losses(read(folder / 'sweep/trials.csv'))
  moves = {kind: rates.moves(by_width) for kind, by_width in found.items()}
  seen = all(map(rates.bracketed, (*found[rates.STANDARD].values(), *found[rates.MUP].values())))
  best = {kind: ', '.join(f'{rates.best(one):g} at {width}' for width, one in by_width.items()) for kind, by_width in found.items()}
  return Result('over widths 64 to 512, with lower and higher rates tried at each, the best peak rate of AdamW moves by at most one factor '
                'of 2 under muP, where that of standard parametrization moves by at least two',
                '; '.join(f'{kind}: {best[kind]}, so {moves[kind]:g} factors' for kind in found),
                seen and moves[rates.MUP] <= 1 and moves[rates.STANDARD] >= 2,
                'python -m tests.acceptance --only=learning_rate_transfer')


@bar
def coordinate_check(folder: Path) -> Result:
  on_cpu()
  found = {kind: activations.measured(mup, WIDTHS, _SEEDS) for kind, mup in activations.KINDS.items()}
  spreads = {kind: {name: activations.spread(change) for name, change in changes.items()} for kind, changes in found.items()}
  told = '; '.join(f'{kind}: {", ".join(f"{name} {one:.0%}" for name, one in by_name.items())}' for kind, by_name in spreads.items())
  return Result('under muP, the change of every activation (embeddings, scores, outputs of attention and MLP, logits) in the first '
                f'{activations.STEPS} steps, a mean over {_SEEDS} seeds, is at each of the widths 64 to 512 within 20 % of the mean over '
                'widths', told, max(spreads['AdamW, muP'].values()) <= 0.2, 'python -m tests.acceptance --only=coordinate_check')
