"""What a run trains for, and which parameters: all, or adapters."""

import dataclasses
import math
import re
from typing import Annotated, Literal, get_args

from gptjax.config.checks import (
  Group, Limit, NonNegative, NonNegativeFloat, Positive, PositiveFloat, UserError, at_least, at_most)

_PreferenceLoss = Literal['dpo', 'robust', 'ipo', 'hinge', 'dpo_norm', 'apo_zero', 'apo_down', 'kto', 'simpo', 'orpo']
_PolicyLoss = Literal['grpo', 'dr_grpo', 'dapo', 'gspo', 'rloo']
_DistillationLoss = Literal['forward_kl', 'reverse_kl']
LOSSES: dict[str, tuple[str, ...]] = {'preference': get_args(_PreferenceLoss), 'grpo': get_args(_PolicyLoss),
                                      'distillation': get_args(_DistillationLoss)}


@dataclasses.dataclass(frozen=True)
class Reward(Group, prefix='objective.rewards: '):
  """A reward of a completion."""

  name: str
  """exact, number, format or length of gptjax/training/rewards.py, or a function in the file of --reward_file"""
  weight: float = 1.0
  """its factor in the sum of all rewards"""
  pattern: str = ''
  """format: regular expression that the complete text must match"""

  def __post_init__(self):
    super().__post_init__()
    if bool(self.pattern) != (self.name == 'format'):
      raise UserError('objective.rewards: pattern', self.pattern, 'a regular expression for format, and none for other rewards')
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise UserError('objective.rewards: pattern', self.pattern, f'a regular expression ({error})') from None


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(Group, prefix='objective.'):
  """The training objective."""

  kind: Literal['next_token', 'sft', 'classification', 'preference', 'grpo', 'distillation'] | str = 'next_token'
  """next_token: all tokens of documents; sft: the answers of examples (supervised fine-tuning); classification: the classes of texts;
  preference: pairs of answers; grpo: rewards of completions that the model draws; distillation: the probabilities of a teacher; or
  MODULE:NAME of your own, as in examples/own_objective.py"""
  loss: Literal['', _PreferenceLoss, _PolicyLoss, _DistillationLoss] = ''
  """of preference (empty: dpo; simpo and orpo need no reference, the model of init_from), of grpo (empty: grpo) or of distillation (empty:
  forward_kl, KL(teacher || model); reverse_kl: KL(model || teacher))"""
  beta: PositiveFloat = 0.1
  """preference: factor of rewards; orpo: weight of the odds ratio"""
  smoothing: Annotated[float, Limit(lambda value: 0 <= value < 0.5, 'at least 0 and below 0.5')] = 0.0
  """dpo (cDPO), dpo_norm and robust: probability that the answers of a pair are swapped"""
  margin: NonNegativeFloat = 0.5
  """simpo: subtracted from the difference of rewards (gamma)"""
  chosen_weight: NonNegativeFloat = 0.0
  """preference: weight of the mean cross-entropy per token of the chosen answer, which is added (arXiv:2404.19733); orpo: 1 more"""
  rewards: tuple[Reward, ...] = ()
  """grpo: what is rewarded; JSON on a command line: '[{"name": "exact"}, {"name": "length", "weight": 0.1}]'"""
  group: Annotated[int, at_least(2), at_most(10_000)] = 8
  """grpo: completions of each prompt; a step takes batch_size / group prompts"""
  max_tokens: Positive = 256
  """grpo, own_samples: tokens after which a completion is cut"""
  rollout_steps: Annotated[int, at_least(1), at_most(1000)] = 1
  """grpo: steps whose completions are drawn together, before the first of them; above 1, later ones are off policy, and clipped"""
  clip: NonNegativeFloat = 0.0
  """grpo: the ratio to the policy that drew a token is clipped at 1 - clip; 0: 0.2, gspo 3e-4; rloo clips nothing"""
  clip_high: NonNegativeFloat = 0.0
  """grpo: and at 1 + clip_high; 0: as clip, dapo 0.28, gspo 4e-4"""
  kl: NonNegativeFloat = 0.0
  """grpo: weight of the divergence from the model of init_from, per token (k3 of http://joschu.net/blog/kl-approx.html)"""
  count_truncated: bool = True
  """grpo: train on completions that were cut at max_tokens; false: leave them out, but not out of the group's mean"""

  teacher: str = ''
  """distillation: workdir of a run or an imported model with the same vocabulary, or one checkpoint in it"""
  temperature: PositiveFloat = 1.0
  """distillation: divisor of the logits of both models (arXiv:1503.02531)"""
  own_samples: bool = False
  """distillation: on answers that the model draws for the prompts of examples, in place of those in the data"""

  def __post_init__(self):
    super().__post_init__()
    mine = {'preference': ('beta', 'smoothing', 'margin', 'chosen_weight'),
            'grpo': ('rewards', 'group', 'rollout_steps', 'clip', 'clip_high', 'kl', 'count_truncated'),
            'distillation': ('teacher', 'temperature', 'own_samples')}
    for kind, names in mine.items():
      for name in names if self.kind != kind else ():
        if (value := getattr(self, name)) != getattr(ObjectiveConfig, name):
          raise UserError(f'objective.{name}', value, f'its default unless objective.kind is {kind}')
    if self.max_tokens != ObjectiveConfig.max_tokens and not self.draws:
      raise UserError('objective.max_tokens', self.max_tokens, 'its default unless the model draws completions: objective.kind=grpo, or '
                      'objective.own_samples')
    if self.kind == 'distillation' and not self.teacher:
      raise UserError('objective.teacher', '', 'the run or imported model to learn from')
    losses = LOSSES.get(self.kind, ())
    if self.loss and self.loss not in losses:
      raise UserError('objective.loss', self.loss, f'{", ".join(losses) or "none"} with objective.kind={self.kind}')
    for name, allowed in (('smoothing', ('', 'dpo', 'dpo_norm', 'robust')), ('margin', ('simpo',))):
      if (value := getattr(self, name)) != getattr(ObjectiveConfig, name) and self.loss not in allowed:
        raise UserError(f'objective.{name}', value, f'its default with objective.loss={self.loss or "dpo"}')
    if self.kind == 'grpo' and not self.rewards:
      raise UserError('objective.rewards', [], 'one or more: \'[{"name": "exact"}]\'')
    if len({one.name for one in self.rewards}) < len(self.rewards):
      raise UserError('objective.rewards: name', [one.name for one in self.rewards], 'each name once')

  @property
  def rows_per_example(self) -> int:
    """Rows of a run per row of its data: completions of a prompt."""
    return self.group if self.kind == 'grpo' else 1

  @property
  def draws(self) -> bool:
    """Whether the rows of a step are completions that the model draws."""
    return self.kind == 'grpo' or self.own_samples

  @property
  def needs_reference(self) -> bool:
    """Whether the loss reads log-probabilities of the model of init_from."""
    return (self.kind == 'preference' and self.loss not in ('simpo', 'orpo')) or (self.kind == 'grpo' and self.kl > 0)


_DATA = {
  'next_token': 'documents', 'sft': 'examples', 'grpo': 'examples',
  'distillation': 'documents or examples, with objective.own_samples examples',
  'classification': 'texts with data.source.label',
  'preference': 'pairs, of data.source.chosen and rejected, with data.source.mismatched for objective.loss=kto and else without'}


def check_objective(objective: ObjectiveConfig, *, parts: int, has_classes: bool) -> None:
  """Raises a UserError for an objective of ours that trains on other data.

  Args:
    parts: of an example: 1, or 2 or 3 of a pair; 0 for documents.
    has_classes: whether they are texts with classes.
  """
  found = 'classification' if has_classes else ('next_token', 'sft', 'preference', 'preference')[parts]
  also = {'next_token': () if objective.draws else ('distillation',), 'sft': ('grpo', 'distillation')}.get(found, ())
  found = objective.kind if objective.kind in also else found
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
