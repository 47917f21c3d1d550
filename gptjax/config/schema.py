"""The config of a run: frozen dataclasses that validate themselves. The docstring of a field is its help text."""

import dataclasses
import math
import re
from typing import Annotated, Literal

from gptjax.config.checks import (
  Fraction, FractionBelow1, Group, Limit, NonNegative, NonNegativeFloat, Positive, UserError, at_least, at_most, check_objective,
  divisors)
from gptjax.config.mesh import MeshConfig, PipelineConfig
from gptjax.config.model import ComputeConfig, ModelConfig

Duration = int | str
"""A length of training: steps (2000), or text with a unit: '2000 steps', '1.5e6 tokens', '3 epochs'."""
DURATIONS = "a count of steps (2000), or one with its unit: '1.5e6 tokens', '3 epochs'"
"""Description of valid durations, for an error."""

LEAST_VOCABULARY = 300
"""Smallest vocab_size of a tokenizer that is trained."""
_DURATION = re.compile(r'\s*([0-9]+(?:_[0-9]+)*\.?[0-9]*(?:e[+]?[0-9]+)?)\s*(?:(step|token|epoch)s?)?\s*', re.IGNORECASE)


def _amount_and_unit(value: Duration) -> tuple[float, str]:
  """Returns for example (1.5e6, 'token'); an infinite amount if the value is not a Duration."""
  match = _DURATION.fullmatch(str(value))
  amount, unit = (float(match[1]), (match[2] or 'step').lower()) if match else (math.inf, '')
  return (math.inf, '') if unit == 'step' and amount % 1 else (amount, unit)


def duration_in_steps(field: str, value: Duration, *, batch_size: int, context: int, rows_per_epoch: int) -> int:
  """A Duration in optimizer steps, rounded up; a step has batch_size * context tokens, and an epoch rows_per_epoch rows."""
  amount, unit = _amount_and_unit(value)
  if math.isinf(amount * rows_per_epoch):
    raise UserError(field, value, DURATIONS)
  steps = {'step': amount, 'token': amount / (batch_size * context), 'epoch': amount * rows_per_epoch / batch_size}[unit]
  return math.ceil(steps - 1e-9)


def in_unit_of_steps(value: Duration) -> bool:
  """Whether a Duration is in steps, so that its number of tokens depends on the batch size."""
  return _amount_and_unit(value)[1] == 'step'


_Duration = Annotated[Duration, Limit(lambda value: math.isfinite(_amount_and_unit(value)[0]), DURATIONS)]


@dataclasses.dataclass(frozen=True)
class SourceConfig(Group, prefix='data.source.'):
  """Source of the documents."""

  path: str = ''
  """text, .jsonl or .parquet files (also .gz, .zst): a path, folder or glob, local or on s3:// or gs://; or tfds:NAME or hf:NAME;
  empty: the built-in corpus, Python's standard library"""
  split: str = 'train'
  """split of a tfds: or hf: dataset"""
  text: str = 'text'
  """field that holds a record's text, or a template over fields: '{question}\\n{answer}'"""
  separator: str = ''
  """separator of documents in a text file, such as '\\n\\n'; empty: each file is one document"""
  prompt: str = ''
  """examples to fine-tune on: field or template of the prompt, with data.source.completion"""
  completion: str = ''
  """field or template of the completion of data.source.prompt"""
  messages: str = ''
  """conversations to fine-tune on: field with a list of messages, each with a role, a content and optionally a weight of its loss"""
  chat: Literal['', 'template', 'plain'] = ''
  """how conversations, and prompts with their completions, are written: by the tokenizer's chat template, or plain, below headings such as
  '### User:', with the end of text after each answer; empty: a prompt and its completion as they are"""
  supervised: Literal['answers', 'all'] = 'answers'
  """targets in the loss of examples: answers (completions, turns of the assistant) with their ends, or all"""
  label: str = ''
  """texts to classify: field with the class of data.source.text, a name in data.source.labels or its number there, from 0"""
  labels: tuple[str, ...] = ()
  """names of the classes of data.source.label; JSON on a command line: '["ham", "spam"]'"""
  skip: Fraction = 0.0
  """largest fraction of malformed records that may be skipped; more is an error"""

  @property
  def has_examples(self) -> bool:
    """Whether its documents are examples, whose answers or classes are targets."""
    return bool(self.prompt or self.completion or self.messages or self.label)

  def __post_init__(self):
    super().__post_init__()
    if bool(self.prompt) != bool(self.completion):
      raise UserError(f'data.source.{"completion" if self.prompt else "prompt"}', '', 'a field or template: prompt and completion together')
    if self.messages and self.prompt:
      raise UserError('data.source.messages', self.messages, 'none with data.source.prompt')
    if self.messages and not self.chat:
      raise UserError('data.source.chat', '', "template, the tokenizer's, or plain, with data.source.messages")
    has_answers = bool(self.prompt or self.messages)
    if has_answers and self.text != SourceConfig.text:
      raise UserError('data.source.text', self.text, 'no text with data.source.prompt or messages')
    for field in () if has_answers else ('chat', 'supervised'):
      if (value := getattr(self, field)) != getattr(SourceConfig, field):
        raise UserError(f'data.source.{field}', value, 'none without data.source.prompt or messages')
    if self.label and has_answers:
      raise UserError('data.source.label', self.label, 'none with data.source.prompt or messages')
    if self.label and (len(self.labels) < 2 or len({*self.labels}) < len(self.labels) or not all(map(str.strip, self.labels))):
      raise UserError('data.source.labels', list(self.labels), 'the names of two classes or more, each once, as in \'["ham", "spam"]\'')
    if self.labels and not self.label:
      raise UserError('data.source.label', '', 'the field with the class of each text, with data.source.labels')


@dataclasses.dataclass(frozen=True)
class TokenizerConfig(Group, prefix='data.tokenizer.'):
  """The tokenizer."""

  kind: Literal['bpe', 'unigram', 'chars', 'bytes'] = 'bpe'
  """bpe, unigram: SentencePiece trained on the training documents; chars: one id per character; bytes: one id per byte"""
  vocab_size: Annotated[int, at_least(LEAST_VOCABULARY), at_most(2**24)] = 4096
  """number of ids of a SentencePiece tokenizer, including 3 special ids and 256 bytes; ignored by chars and bytes"""
  path: str = ''
  """folder of an existing tokenizer, from tools.train_tokenizer or a published model; empty: train one"""


@dataclasses.dataclass(frozen=True)
class Component(Group, prefix='data.train: '):
  """A token store in a mixture."""

  store: str
  """folder or URL of a token store that tools.prepare_data made"""
  weight: NonNegativeFloat = 0.0
  """share of the rows, relative to the other weights; 0 in all components: proportional to their sizes"""
  epochs: NonNegativeFloat = 0.0
  """maximum number of passes, after which the other components take over its share; 0: unlimited"""


@dataclasses.dataclass(frozen=True)
class Phase(Group, prefix='data.phases: '):
  """Weights of a mixture from a point of training on."""

  start: _Duration
  """duration from the start of training at which they apply"""
  weights: tuple[float, ...]
  """one per component, in order"""

  def __post_init__(self):
    super().__post_init__()
    if not self.weights or min(self.weights) < 0 or not max(self.weights):
      raise UserError('data.phases: weights', list(self.weights), '0 or more per component, with at least one above 0')


@dataclasses.dataclass(frozen=True)
class ValidationSet:
  """A named set of held-out documents."""

  name: str
  """name of its scores: letters, digits, - and _"""
  store: str
  """folder or URL of a token store that tools.prepare_data made"""
  tags: tuple[str, ...] = ()
  """groups of sets, which are also scored together"""

  def __post_init__(self):
    for name in (self.name, *self.tags):
      if not re.fullmatch(r'[\w-]+', name):
        raise UserError('data.valid', name, 'names and tags of letters, digits, - and _')
    if len(set(self.tags)) < len(self.tags):
      raise UserError('data.valid: tags', list(self.tags), 'each tag once')


@dataclasses.dataclass(frozen=True)
class DataConfig(Group, prefix='data.'):
  """Rows of tokens: from a source that is tokenized on first use, or from prepared token stores."""

  source: SourceConfig = SourceConfig()
  """documents to train on"""
  valid_fraction: Annotated[float, Limit(lambda value: 0 < value < 1, 'above 0 and below 1')] = 0.1
  """fraction of the source's text that is held out for validation: complete documents and, if they are few, the end of one"""
  tokenizer: TokenizerConfig = TokenizerConfig()
  """the source's tokenizer"""
  train: tuple[Component, ...] = ()
  """mixture of token stores to train on; JSON on a command line: '[{"store": "stores/books", "weight": 2}]'"""
  phases: tuple[Phase, ...] = ()
  """changes of the mixture's weights: '[{"start": "1e9 tokens", "weights": [1, 3]}]'"""
  valid: tuple[ValidationSet, ...] = ()
  """token stores to validate on, with data.train: '[{"name": "books", "store": "stores/books_valid", "tags": ["prose"]}]'"""
  context: Positive = 256
  """tokens per row"""
  rows: Literal['concat', 'pack', 'document'] = 'concat'
  """concat: windows over all documents end to end; pack: complete documents, best fit; document: one per row"""
  isolate_documents: bool = True
  """restart attention and positions at each document in a row"""
  long_examples: Literal['drop', 'cut'] = 'drop'
  """examples longer than the context: drop them, or cut them to their first tokens, if these have targets, and texts to classify to \
their last"""
  prefetch: Annotated[int, at_least(0), at_most(1000)] = 2
  """number of batches to prepare ahead; 0: none"""
  workers: Annotated[int, at_least(0), at_most(1000)] = 0
  """number of processes that prepare batches; 0: a thread"""

  def __post_init__(self):
    super().__post_init__()
    if self.workers and not self.prefetch:
      raise UserError('data.prefetch', 0, '1 or more with data.workers')
    if self.source.has_examples:
      self.check_examples()
    if self.source.chat == 'template' and not self.tokenizer.path:
      raise UserError('data.tokenizer.path', '', 'a tokenizer with a chat template, or data.source.chat=plain')
    unweighted = [component.store for component in self.train if not component.weight]
    if 0 < len(unweighted) < len(self.train):
      raise UserError('data.train: weight', 0.0, f'a weight above 0 for {unweighted[0]} too, or 0 for all components')
    for phase in self.phases:
      if len(phase.weights) != len(self.train):
        raise UserError('data.phases: weights', list(phase.weights), f'{len(self.train)} weights, one per component of data.train')
    for field, names in (('train: store', [component.store for component in self.train]),
                         ('valid: name', [one.name for one in self.valid])):
      twice = next((name for name in names if names.count(name) > 1), None)
      if twice is not None:
        raise UserError(f'data.{field}', twice, 'unique values')
    if len(self.valid) > 1 and 'valid' in [one.name for one in self.valid]:
      raise UserError('data.valid: name', 'valid', 'another name: this one is reserved for all sets together')
    if self.valid and not self.train:
      raise UserError('data.valid', [one.name for one in self.valid],
                      'none without data.train; with data.source, data.valid_fraction is held out')
    if self.train and not self.valid:
      raise UserError('data.valid', [], 'at least one validation set with data.train')
    if self.train and self.source != SourceConfig():
      raise UserError('data.source.path', self.source.path, 'no source together with data.train')

  def check_examples(self) -> None:
    """Raises a UserError if its rows cannot have examples."""
    if self.rows == 'concat':
      raise UserError('data.rows', self.rows, 'pack or document for examples, which are not cut')
    if not self.isolate_documents:
      raise UserError('data.isolate_documents', False, 'true for examples, which do not see each other')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Group, prefix='optimizer.'):
  """The optimizer and the learning rate."""

  name: Literal['adamw', 'muon'] = 'adamw'
  """adamw (arXiv:1711.05101), or muon for the matrices of blocks with adamw for all other parameters"""
  peak_lr: NonNegativeFloat = 1e-3
  """peak learning rate of adamw"""
  muon_lr: NonNegativeFloat = 0.02
  """peak learning rate of muon, scaled per matrix by max(1, outputs/inputs)^0.5; same schedule as peak_lr; logged as muon_learning_rate"""
  schedule: Literal['cosine', 'linear', 'wsd', 'constant'] = 'cosine'
  """decay of the rate after warmup; wsd (warmup, stable, decay) stays at the peak, then decays linearly over the last `decay`"""
  warmup: _Duration = 100
  """duration of the linear warmup"""
  decay: _Duration = 0
  """duration of the final decay, for wsd only"""
  final_fraction: Fraction = 0.1
  """final learning rate as a fraction of the peak; ignored by constant"""
  b1: FractionBelow1 = 0.9
  """adamw: decay of the first moment, per step"""
  b2: FractionBelow1 = 0.95
  """adamw: decay of the second moment, per step"""
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
class ObjectiveConfig(Group, prefix='objective.'):
  """The training objective."""

  kind: str = 'next_token'
  """next_token: all tokens of documents; sft: the answers of examples (supervised fine-tuning); classification: the classes of texts; or
  another name in OBJECTIVES of gptjax/training/objective.py"""


@dataclasses.dataclass(frozen=True)
class EvalConfig(Group, prefix='eval.'):
  """Validation and samples during training."""

  every: _Duration = 250
  """duration between validations; 0: only at the end"""
  rows: NonNegative = 0
  """number of validation rows to score during training, evenly spaced; 0: all, as always at the end"""
  sample_tokens: NonNegative = 200
  """length in tokens of the sample printed with each validation; 0: no sample, as of a model that classifies"""
  prompt: str = ''
  """prompt of the sample, a message where data.source.chat is set; '\\n', '\\t' and '\\\\' are a line end, a tab and a backslash"""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Group, prefix='checkpoint.'):
  """Checkpoints of the run."""

  every: _Duration = 1000
  """duration between checkpoints; 0: only at the end"""
  minutes: NonNegativeFloat = 0.0
  """also save after this many minutes of wall-clock time; 0: off"""
  keep: Positive = 2
  """number of latest checkpoints to keep; 1 leaves none to fall back to if it is damaged"""
  keep_every: _Duration = 0
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
  compare_every: _Duration = 0
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
  steps: _Duration = 1000
  """duration of training"""
  batch_size: Positive = 16
  """rows (sequences) per step, over all devices"""
  microbatches: Positive = 1
  """number of microbatches per batch (gradient accumulation), which saves memory"""
  objective: ObjectiveConfig = ObjectiveConfig()
  """what is trained for"""
  z_loss: NonNegativeFloat = 0.0
  """weight of the squared log-normalizer in the training loss (arXiv:2204.02311, section 5)"""
  zero_stage: Annotated[int, Limit(lambda stage: stage in range(4), '0, 1, 2 or 3')] = 0
  """sharded along mesh.data (arXiv:1910.02054): 0 nothing, 1 the optimizer state, 2 also gradients, 3 also parameters"""
  init_from: str = ''
  """workdir, or one checkpoint in it, whose parameters a new run starts from; optimizer, step and data start fresh"""
  init_partial: bool = False
  """load what fits of init_from by name (larger or smaller tables: first rows; deeper models: first layers); initialize the rest"""
  frozen: tuple[str, ...] = ()
  """patterns of names of parameters that are not trained; JSON on a command line: '["tokens/*", "blocks/0/*"]'"""
  seed: Annotated[int, at_least(0), Limit(lambda seed: seed < 2**32, 'below 2**32')] = 0
  """seed of initialization, data order and dropout"""

  @property
  def microbatch_size(self) -> int:
    """Sequences per microbatch, over all devices."""
    return self.batch_size // self.microbatches

  def __post_init__(self):
    super().__post_init__()
    if self.batch_size % self.microbatches:
      expected = f'a divisor of batch_size={self.batch_size}: {divisors(self.batch_size)}'
      raise UserError('microbatches', self.microbatches, expected)
    if self.data.source.has_examples:
      check_objective(self.objective.kind, has_examples=True, has_classes=bool(self.data.source.label))
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
