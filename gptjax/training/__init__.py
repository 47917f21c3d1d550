"""Training: objectives, optimizers, the train step, and the loop around it."""

from gptjax.training.loop import Options, train
from gptjax.training.objective import Batch, Objective, ObjectiveFunction, make_objective, next_token
from gptjax.training.optimizer import make_optimizer, schedule
from gptjax.training.run import Run, check_unsharded, resolve
from gptjax.training.step import TrainState, abstract, initializer, train_step

__all__ = [
  'Batch', 'Objective', 'ObjectiveFunction', 'Options', 'Run', 'TrainState', 'abstract', 'check_unsharded', 'initializer', 'make_objective',
  'make_optimizer', 'next_token', 'resolve', 'schedule', 'train', 'train_step',
]
