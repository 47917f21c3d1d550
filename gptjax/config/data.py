"""The data of a run: documents or examples from a source, or prepared token stores, and the rows that they become."""

import dataclasses
import re
from typing import Annotated, Literal

from gptjax.config.checks import Fraction, Group, Limit, NonNegativeFloat, Positive, UserError, at_least, at_most
from gptjax.config.durations import DurationField

LEAST_VOCABULARY = 300
"""Smallest vocab_size of a tokenizer that is trained."""


@dataclasses.dataclass(frozen=True)
class SourceConfig(Group, prefix='data.source.'):
  """Source of the documents."""

  path: str = ''
  """text, .jsonl or .parquet files (also .gz, .zst): a path, folder or glob, local or on s3:// or gs://; tfds:NAME or hf:NAME; or
  python:MODULE:NAME of your own, as in examples/own_source.py; empty: the built-in corpus, Python's standard library"""
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
  chosen: str = ''
  """pairs of answers, for preferences: field or template of the better answer to data.source.prompt; without a prompt, field with a
  conversation that ends with it"""
  rejected: str = ''
  """the same of the worse answer"""
  mismatched: bool = False
  """each pair has a third part, its prompt with the chosen answer to another: for objective.loss=kto, which estimates a KL divergence"""
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
    return bool(self.prompt or self.completion or self.messages or self.chosen or self.rejected or self.label)

  @property
  def parts(self) -> int:
    """Parts of an example: 1, or 2 or 3 of a pair; 0 for documents."""
    return 2 + self.mismatched if self.chosen else int(self.has_examples)

  def __post_init__(self):
    super().__post_init__()
    if bool(self.chosen) != bool(self.rejected):
      raise UserError(f'data.source.{"rejected" if self.chosen else "chosen"}', '', 'a field or template: chosen and rejected together')
    if bool(self.prompt) != bool(self.completion or (self.prompt and self.chosen)):
      raise UserError(f'data.source.{"completion" if self.prompt else "prompt"}', '', 'a field or template: prompt and completion together')
    if self.chosen and self.completion:
      raise UserError('data.source.completion', self.completion, 'none with data.source.chosen and rejected')
    if self.messages and (self.prompt or self.chosen):
      raise UserError('data.source.messages', self.messages, 'none with data.source.prompt, or chosen and rejected')
    conversation = self.messages or (self.chosen if not self.prompt else '')
    if conversation and not self.chat:
      raise UserError('data.source.chat', '', f"template, the tokenizer's, or plain, with the conversations of {conversation}")
    if self.chosen and self.supervised != 'answers':
      raise UserError('data.source.supervised', self.supervised, 'answers with data.source.chosen and rejected')
    if self.mismatched and not self.chosen:
      raise UserError('data.source.mismatched', True, 'false without data.source.chosen and rejected')
    has_answers = bool(self.prompt or self.messages or self.chosen)
    if has_answers and self.text != SourceConfig.text:
      raise UserError('data.source.text', self.text, 'no text with data.source.prompt, messages or chosen')
    for field in () if has_answers else ('chat', 'supervised'):
      if (value := getattr(self, field)) != getattr(SourceConfig, field):
        raise UserError(f'data.source.{field}', value, 'none without data.source.prompt, messages or chosen')
    if self.label and has_answers:
      raise UserError('data.source.label', self.label, 'none with data.source.prompt, messages or chosen')
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

  start: DurationField
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
  """examples longer than the context: drop them, or cut them to their first `context` tokens, if these have targets, and texts with a \
class to their end"""
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
    if self.source.chosen and self.long_examples == 'cut':
      raise UserError('data.long_examples', 'cut', 'drop for pairs, which are not cut')
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
