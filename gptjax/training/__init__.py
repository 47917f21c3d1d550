"""Training: objectives, optimizers, the train step, and the loop around it."""

from gptjax.training.loop import Options, train
from gptjax.training.objective import classification, make_objective, next_token
from gptjax.training.optimizer import learning_rates, make_optimizer, scale_by_rate
from gptjax.training.reference import use_columns, write_columns
from gptjax.training.rewards import make_rewards
from gptjax.training.run import Run, check_unsharded, resolve
from gptjax.training.passes import PassScorer
from gptjax.training.policy import policy_gradient
from gptjax.training.preferences import preference
from gptjax.training.step import TrainState, abstract, frozen_names, initializer, state_bytes, train_step
from gptjax.training.sums import Batch, ObjectiveFunction, ObjectiveSums
