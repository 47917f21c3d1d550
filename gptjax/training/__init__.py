"""Training: objectives, optimizers, the train step, and the loop around it."""

from gptjax.training.loop import Options, train
from gptjax.training.objective import Batch, ObjectiveSums, ObjectiveFunction, classification, make_objective, next_token
from gptjax.training.optimizer import learning_rates, make_optimizer
from gptjax.training.run import Run, check_unsharded, resolve
from gptjax.training.step import TrainState, abstract, frozen_names, initializer, state_bytes, train_step
