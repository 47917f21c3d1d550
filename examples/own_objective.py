"""An objective of your own: focal loss (arXiv:1708.02002), which counts tokens less the better they are already predicted.

  python -m gptjax.train --config=examples/own_objective.py --workdir=runs/own_objective
  python -m gptjax.evaluate --workdir=runs/own_objective
"""

import jax
import jax.numpy as jnp

import gptjax
from gptjax.training import ObjectiveSums

GAMMA = 2.0


def focal(head, hidden, batch):
  """The sum of -(1 - p)^GAMMA log p over targets of probability p, for the rows of one device.

  Args:
    head: the output head, which turns hidden states into log-probabilities.
    hidden: hidden states [B * T, D] after the last norm.
    batch: tokens, targets and mask [B, T].
  """
  mask = batch['mask'].reshape(-1)
  logs, _ = head.log_probabilities(hidden, batch['targets'].reshape(-1))
  loss = -jnp.sum(mask * (1 - jnp.exp(logs)) ** GAMMA * logs)
  entropy = -jnp.sum(mask * logs)  # is logged as the loss, so that the run can be compared with others
  return ObjectiveSums(loss, targets=jnp.sum(mask), metrics={'loss': jax.lax.stop_gradient(entropy)})


def make_focal(config):
  """What objective.kind names: a function from the config of a run to its objective."""
  return focal


def get_config():
  return gptjax.load_config('configs/experiment.py', {'objective.kind': 'examples.own_objective:make_focal'})
