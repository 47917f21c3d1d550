"""What a run trains for, and which parameters: all, or adapters."""

import dataclasses
import math
from typing import Annotated, Literal

from gptjax.config.checks import Group, Limit, NonNegative, NonNegativeFloat, PositiveFloat, UserError

PreferenceLoss = Literal['', 'dpo', 'robust', 'ipo', 'hinge', 'dpo_norm', 'apo_zero', 'apo_down', 'kto', 'simpo', 'orpo']


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Group, prefix='objective.'):
  """The training objective."""

  kind: str = 'next_token'
  """next_token: all tokens of documents; sft: the answers of examples (supervised fine-tuning); classification: the classes of texts;
  preference: pairs of answers; or another name in OBJECTIVES of gptjax/training/objective.py"""
  loss: PreferenceLoss = ''
  """of preference; empty: dpo. simpo and orpo need no reference, the model of init_from"""
  beta: PositiveFloat = 0.1
  """preference: factor of rewards; orpo: weight of the odds ratio"""
  smoothing: Annotated[float, Limit(lambda value: 0 <= value < 0.5, 'at least 0 and below 0.5')] = 0.0
  """dpo (cDPO), dpo_norm and robust: probability that the answers of a pair are swapped"""
  margin: NonNegativeFloat = 0.5
  """simpo: subtracted from the difference of rewards (gamma)"""
  chosen_weight: NonNegativeFloat = 0.0
  """preference: weight of the mean cross-entropy per token of the chosen answer, which is added (arXiv:2404.19733); orpo: 1 more"""

  def __post_init__(self):
    super().__post_init__()
    if self.kind != 'preference':
      for name in ('loss', 'beta', 'smoothing', 'margin', 'chosen_weight'):
        if (value := getattr(self, name)) != getattr(ObjectiveConfig, name):
          raise UserError(f'objective.{name}', value, 'its default unless objective.kind is preference')
    for name, losses in (('smoothing', ('', 'dpo', 'dpo_norm', 'robust')), ('margin', ('simpo',))):
      if (value := getattr(self, name)) != getattr(ObjectiveConfig, name) and self.loss not in losses:
        raise UserError(f'objective.{name}', value, f'its default with objective.loss={self.loss or "dpo"}')

  @property
  def needs_reference(self) -> bool:
    """Whether the loss reads log-probabilities of the model of init_from."""
    return self.kind == 'preference' and self.loss not in ('simpo', 'orpo')


_DATA = {
  'next_token': 'documents', 'sft': 'examples', 'classification': 'texts with data.source.label',
  'preference': 'pairs, of data.source.chosen and rejected, with data.source.mismatched for objective.loss=kto and else without'}


def check_objective(objective: ObjectiveConfig, *, parts: int, has_classes: bool) -> None:
  """Raises a UserError for an objective of ours that trains on other data.

  Args:
    parts: of an example: 1, or 2 or 3 of a pair; 0 for documents.
    has_classes: whether they are texts with classes.
  """
  found = 'classification' if has_classes else ('next_token', 'sft', 'preference', 'preference')[parts]
  wrong = objective.kind in _DATA and objective.kind != found
  if wrong or (objective.kind == 'preference' and (parts == 3) != (objective.loss == 'kto')):
    raise UserError('objective.kind', objective.kind, f'{found} for {_DATA[found]}; ' + (
      f'{objective.kind} is for {_DATA[objective.kind]}' if wrong else f'objective.loss is {objective.loss or "dpo"}'))


@dataclasses.dataclass(frozen=True)
class LoraConfig(Group, prefix='lora.'):
  """Low-rank adaptation (LoRA, arXiv:2106.09685): matrices W of the model that init_from names stay as they are, and W + scale * A B takes
  their place, of which only A [inputs, rank] and B [rank, outputs] are trained and saved."""

  rank: NonNegative = 0
  """columns of A and rows of B; 0: no adapters, all of the model is trained"""
  alpha: PositiveFloat = 16.0
  """scale = alpha / rank"""
  stabilized: bool = False
  """scale = alpha / rank^0.5 (rsLoRA, arXiv:2312.03732)"""
  targets: tuple[str, ...] = ('blocks/*/kernel',)
  """patterns of names of linear layers' matrices; JSON on a command line: '["blocks/*/attention/q/kernel", "blocks/*/mlp/*/kernel"]'"""

  def __post_init__(self):
    super().__post_init__()
    if self.rank and not self.targets:
      raise UserError('lora.targets', [], 'patterns of names of matrices')
    for name in () if self.rank else ('alpha', 'stabilized', 'targets'):
      if (value := getattr(self, name)) != getattr(LoraConfig, name):
        raise UserError(f'lora.{name}', value, 'its default unless lora.rank is above 0')

  @property
  def scale(self) -> float:
    """Factor of A B."""
    return self.alpha / (math.sqrt(self.rank) if self.stabilized else self.rank)
