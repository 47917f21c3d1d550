"""The config of a run: frozen dataclasses that validate themselves. The docstring of a field is its help text."""

import dataclasses
from typing import Annotated, Literal

from gptjax.config.checks import (
  Fraction, FractionBelow1, Group, Limit, NonNegative, NonNegativeFloat, Positive, UserError, at_least, divisors)
from gptjax.config.data import DataConfig
from gptjax.config.durations import DurationField
from gptjax.config.mesh import MeshConfig, PipelineConfig
from gptjax.config.model import ComputeConfig, ModelConfig
from gptjax.config.objective import LoraConfig, ObjectiveConfig, check_objective


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Group, prefix='optimizer.'):
  """The optimizer and the learning rate."""

  name: Literal['adamw', 'muon', 'lion'] | str = 'adamw'
  """adamw (arXiv:1711.05101), muon for the matrices of blocks with adamw for all other parameters, lion (arXiv:2302.06675), which \
moves every parameter by a sign and keeps one moment, or MODULE:NAME of your own, as in examples/own_optimizer.py"""
  peak_lr: NonNegativeFloat = 1e-3
  """peak learning rate of adamw and lion; that of lion is 3 to 10 times lower"""
  muon_lr: NonNegativeFloat = 0.02
  """peak learning rate of muon, scaled per matrix by max(1, outputs/inputs)^0.5; same schedule as peak_lr; logged as muon_learning_rate"""
  schedule: Literal['cosine', 'linear', 'wsd', 'constant'] = 'cosine'
  """decay of the rate after warmup; wsd (warmup, stable, decay) stays at the peak, then decays linearly over the last `decay`"""
  warmup: DurationField = 100
  """duration of the linear warmup"""
  decay: DurationField = 0
  """duration of the final decay, for wsd only"""
  final_fraction: Fraction = 0.1
  """final learning rate as a fraction of the peak; ignored by constant"""
  b1: FractionBelow1 = 0.9
  """adamw: decay of the first moment, per step; lion: share of the moment in the update, beside the gradient"""
  b2: FractionBelow1 = 0.95
  """adamw: decay of the second moment, per step; lion: of its moment, 0.98 or 0.99 in the paper"""
  eps: NonNegativeFloat = 1e-8
  """adamw: added to the square root of the second moment"""
  momentum: FractionBelow1 = 0.95
  """muon: decay of the momentum, per step"""
  balance_rate: NonNegativeFloat = 1e-3
  """change per step of the biases of model.router.bias: down for experts with more than the mean load, else up"""
  weight_decay: NonNegativeFloat = 0.1
  """decoupled weight decay of matrices and embeddings, times the learning rate; none for norms and biases"""
  clip: NonNegativeFloat = 1.0
  """global gradient norm to clip to; 0: no clipping"""

  def __post_init__(self):
    super().__post_init__()
    if self.name == 'lion' and not self.b2:
      raise UserError('optimizer.b2', self.b2, 'a number above 0 with optimizer.name=lion')


def schedule_warning(config: OptimizerConfig, *, steps: int, warmup: int, decay: int) -> str:
  """Returns why a run of `steps` steps does not reach its peak learning rate, as in a short trial of a recipe; '' if it does.

  Raises a UserError if there is no step, or the decay is longer than the run.
  """
  if steps < 1:
    raise UserError('steps', steps, '1 step or more')
  if decay > steps:
    raise UserError('optimizer.decay', config.decay, f'at most the {steps:,} steps of the run')
  below = 'the learning rate stays below its peak: '
  if warmup >= steps:
    return f'{below}optimizer.warmup is {warmup:,} steps, and the run ends after {steps:,}'
  if warmup + decay > steps:
    return f'{below}optimizer.decay begins at step {steps - decay:,}, within the {warmup:,} of optimizer.warmup'
  return ''


@dataclasses.dataclass(frozen=True)
class EvalConfig(Group, prefix='eval.'):
  """Validation and samples during training."""

  every: DurationField = 250
  """duration between validations; 0: only at the end"""
  rows: NonNegative = 0
  """number of validation rows to score during training, evenly spaced; 0: all, as always at the end"""
  sample_tokens: NonNegative = 200
  """length in tokens of the sample printed with each validation; 0: no sample, as of a model that classifies"""
  completions: Positive = 8
  """with objective.kind=grpo, completions drawn for each held-out prompt: for the mean reward, pass@1 and pass@N"""
  prompt: str = ''
  """prompt of the sample, a message where data.source.chat is set; '\\n', '\\t' and '\\\\' are a line end, a tab and a backslash"""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Group, prefix='checkpoint.'):
  """Checkpoints of the run."""

  every: DurationField = 1000
  """duration between checkpoints; 0: only at the end"""
  minutes: NonNegativeFloat = 0.0
  """also save after this many minutes of wall-clock time; 0: off"""
  keep: Positive = 2
  """number of latest checkpoints to keep; 1 leaves none to fall back to if it is damaged"""
  keep_every: DurationField = 0
  """also keep the checkpoints at multiples of this duration; 0: off"""
  keep_best: bool = False
  """also keep the checkpoint with the lowest validation loss"""


@dataclasses.dataclass(frozen=True)
class FaultsConfig(Group, prefix='faults.'):
  """Reactions to bad steps and to devices that silently compute wrong values."""

  bad_step: Literal['stop', 'skip', 'rollback'] = 'stop'
  """reaction to a step whose loss or gradient is not finite or spikes, and whose update is never applied: stop the run, skip to the
  next batch, or roll back to the last checkpoint and skip the batch"""
  spike: NonNegativeFloat = 0.0
  """a loss or gradient norm more than this many running standard deviations above its running mean is a spike; 0: none is"""
  compare_every: DurationField = 0
  """duration between comparisons of replicated arrays across devices; 0: only before each checkpoint"""


@dataclasses.dataclass(frozen=True)
class Config(Group):
  """A training run."""

  model: ModelConfig = ModelConfig()
  """the transformer"""
  compute: ComputeConfig = ComputeConfig()
  """how it is computed"""
  data: DataConfig = DataConfig()
  """documents, tokenizer, rows"""
  optimizer: OptimizerConfig = OptimizerConfig()
  """optimizer and learning rate"""
  mesh: MeshConfig = MeshConfig()
  """devices"""
  pipeline: PipelineConfig = PipelineConfig()
  """pipeline stages"""
  eval: EvalConfig = EvalConfig()
  """validation and samples"""
  checkpoint: CheckpointConfig = CheckpointConfig()
  """checkpoints"""
  faults: FaultsConfig = FaultsConfig()
  """bad steps and silent errors"""
  steps: DurationField = 1000
  """duration of training"""
  batch_size: Positive = 16
  """rows (sequences) per step, over all devices"""
  microbatches: Positive = 1
  """number of microbatches per batch (gradient accumulation), which saves memory"""
  gradient_noise: bool = False
  """log gradient_square and gradient_variance, unbiased estimates; the ratio of their means over steps, variance over square, is the \
gradient noise scale in targets (arXiv:1812.06162); measured between microbatches or devices, of which there must be two"""
  objective: ObjectiveConfig = ObjectiveConfig()
  """what is trained for"""
  z_loss: NonNegativeFloat = 0.0
  """weight of the squared log-normalizer in the training loss (arXiv:2204.02311, section 5)"""
  zero_stage: Annotated[int, Limit(lambda stage: stage in range(4), '0, 1, 2 or 3')] = 0
  """sharded along mesh.data (arXiv:1910.02054): 0 nothing, 1 the optimizer state, 2 also gradients, 3 also parameters"""
  init_from: str = ''
  """workdir, or one checkpoint in it, whose parameters and tokenizer a new run starts from; optimizer, step and data start fresh"""
  init_partial: bool = False
  """load what fits of init_from by name (larger or smaller tables: first rows; deeper models: first layers); initialize the rest"""
  frozen: tuple[str, ...] = ()
  """patterns of names of parameters that are not trained; JSON on a command line: '["tokens/*", "blocks/0/*"]'"""
  lora: LoraConfig = LoraConfig()
  """adapters"""
  seed: Annotated[int, at_least(0), Limit(lambda seed: seed < 2**32, 'below 2**32')] = 0
  """seed of initialization, data order and dropout"""

  @property
  def microbatch_size(self) -> int:
    """Sequences per microbatch, over all devices."""
    return self.batch_size // self.microbatches

  @property
  def lacks_chat_template(self) -> bool:
    """Whether data.source.chat asks for a tokenizer's chat template and data.tokenizer.path names no tokenizer."""
    return self.data.source.chat == 'template' and not self.data.tokenizer.path

  def __post_init__(self):
    super().__post_init__()
    if self.batch_size % self.microbatches:
      expected = f'a divisor of batch_size={self.batch_size}: {divisors(self.batch_size)}'
      raise UserError('microbatches', self.microbatches, expected)
    if self.data.source.has_examples:
      check_objective(self.objective, parts=self.data.source.parts, has_classes=bool(self.data.source.label))
    if self.lacks_chat_template and (self.init_partial or not self.init_from):  # `resolved` takes that of init_from
      raise UserError('data.tokenizer.path', '', 'a tokenizer with a chat template, or data.source.chat=plain')
    if self.objective.needs_reference and not self.init_from:
      name = 'kl' if self.objective.kind == 'grpo' else f'loss={self.objective.loss or "dpo"}'
      raise UserError('init_from', '', f'the run to start from, which is the reference of objective.{name}')
    if self.objective.draws:
      self._check_rollouts()
    if self.objective.kind in ('preference', 'grpo'):
      for field, value in (('z_loss', self.z_loss), ('model.router.balance_loss', self.model.router.balance_loss),
                           ('model.router.z_loss', self.model.router.z_loss)):
        if value:
          raise UserError(field, value, f'0 with objective.kind={self.objective.kind}, whose loss does not count tokens')
    if self.objective.kind == 'distillation' and self.z_loss:
      raise UserError('z_loss', self.z_loss, '0 with objective.kind=distillation: the teacher determines the normalizer')
    if self.lora.rank and not self.init_from:
      raise UserError('init_from', '', 'the run whose model lora.rank adapts')
    if self.lora.rank and self.optimizer.name == 'muon':
      raise UserError('optimizer.name', 'muon', 'adamw or lion with lora.rank')
    if self.lora.rank and (self.init_partial or self.frozen):
      field, value = ('init_partial', True) if self.init_partial else ('frozen', list(self.frozen))
      raise UserError(field, value, 'its default with lora.rank: all of init_from is read, and adapters alone are trained')
    if self.compute.scan and self.model.expert_every > 1:
      raise UserError('compute.scan', True, 'false with model.expert_every above 1, since the layers of a scan are alike')
    optimizer = self.optimizer
    if (optimizer.schedule == 'wsd') != bool(optimizer.decay):
      expected = f"0 unless optimizer.schedule is 'wsd' (it is '{optimizer.schedule}')" if optimizer.decay else (
        "a duration above 0 when optimizer.schedule is 'wsd'")
      raise UserError('optimizer.decay', optimizer.decay, expected)
    checkpoint = self.checkpoint
    if checkpoint.keep_every and not (checkpoint.every or checkpoint.minutes):
      raise UserError('checkpoint.keep_every', checkpoint.keep_every, '0 unless checkpoint.every or checkpoint.minutes is above 0')
    if checkpoint.keep_best and self.eval.rows:
      raise UserError('eval.rows', self.eval.rows, '0 with checkpoint.keep_best: scores of different rows are not comparable')

  def _check_rollouts(self) -> None:
    cause, size = 'objective.kind=grpo' if self.objective.kind == 'grpo' else 'objective.own_samples', self.objective.rows_per_example
    if self.data.source.supervised != 'answers':
      raise UserError('data.source.supervised', self.data.source.supervised, f'answers with {cause}')
    if self.batch_size % size:
      raise UserError('batch_size', self.batch_size, f'a multiple of objective.group={size}: complete groups of completions')
    if self.data.rows != 'document':
      raise UserError('data.rows', self.data.rows, f'document with {cause}: a row is a prompt')
    if self.objective.max_tokens >= self.data.context:
      raise UserError('objective.max_tokens', self.objective.max_tokens, f'below data.context={self.data.context}: rows have prompts too')
