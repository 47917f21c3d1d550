"""An optimizer of your own: SGD with Nesterov momentum, a chain of transformations from optax.

  python -m gptjax.train --config=examples/own_optimizer.py --workdir=runs/own_optimizer
"""

import optax

import gptjax
from gptjax.training import scale_by_rate


def make_sgd(config, width_ratio):
  """What optimizer.name names: a function to an optimizer, which gets gradients whose global norm is clipped to optimizer.clip.

  Args:
    config: the fields optimizer.*.
    width_ratio: model.width relative to model.mup_base; 1 without muP.
  """
  return optax.named_chain(  # the names become those of the optimizer's state in checkpoints
    ('momentum', optax.trace(config.momentum, nesterov=True)),
    ('rate', scale_by_rate('learning_rate')))  # that of the step, by optimizer.peak_lr and schedule


def get_config():
  return gptjax.load_config('configs/experiment.py', {
    'optimizer.name': 'examples.own_optimizer:make_sgd', 'optimizer.peak_lr': 0.3, 'optimizer.momentum': 0.9})
